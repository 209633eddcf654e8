"""Rewards: the loss beside its definition and TRL's, what sampling hands over, bandits, resuming to the bit."""

import copy
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from children import error_output, finish, ranks, start
from scripts import call
from test_dpo import compiled_is_the_same, moved
from test_finetune import TINY, adapter, chat, check_gradients, one_and_two
from test_model import build
from test_prepare import write_rows
from test_processes import run_together
from test_train import CPU, SMALL, WithoutFloat64, log, same
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint_file
import finetune_ppo as ppo
import hf
import lora
import prepare
import toy_stories
import train
from advantages import group_advantages, is_learned, value_advantages, whiten
from config import Refusal, configure
from generate import generate
from messages import chat_messages, conversations, default_template, preferences
from rollouts import find_reward, prompt_messages
from tuning import open_tuning

PROMPTS = ["--dataset=prompts.jsonl", "--val_dataset=held.jsonl"]
REWARDED = [
    "--reward=match:^[^e]*$",
    "--max_new_tokens=8",
    "--group=4",
    "--batch_size=3",
    "--template={prompt}",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with a tiny model in base that writes words of three to six letters, a to e, and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcde"), rng.integers(3, 7))) for _ in range(4000)]
    (folder / "words.txt").write_text("<|endoftext|>".join(words))
    call(
        prepare, "--dataset=words.txt", "--name=words", "--vocab_size=257", "--num_proc=1", folder=folder
    )
    argv = [
        "--max_iters=300",
        "--eval_interval=300",
        "--batch_size=16",
        "--learning_rate=1e-2",  # at 2.5e-3 some seeds know no more than how frequent letters are
        "--block_size=16",
        "--dataset=words",
        "--out_dir=base",
    ]
    call(train, *SMALL, *argv, folder=folder)
    write_rows(folder / "prompts.jsonl", [{"prompt": letter} for letter in "abcde"])
    write_rows(folder / "held.jsonl", [{"prompt": letter} for letter in 20 * "abcde"])
    return folder


def reinforce(shop, *argv):
    call(ppo, *TINY, *REWARDED, "--init_from=base", *PROMPTS, *argv, folder=shop)


def small_task(shop, *argv):
    """Returns a Reinforcing that is ready to train, in float32 on a CPU."""
    argv = [
        *TINY,
        *REWARDED,
        f"--init_from={shop}/base",
        f"--dataset={shop}/prompts.jsonl",
        f"--val_dataset={shop}/held.jsonl",
        *argv,
    ]
    tuning = open_tuning(configure(ppo.Config, argv), "reinforcement")
    task = ppo.Reinforcing(tuning)
    task.trained = tuning.prepare(task.length)
    task.begin()
    return task


# The loss


def random_batch(seed, rows=6, T=7):
    """Returns logps (rows, T), float64, and a batch with all that policy_loss reads, some targets left out."""
    rng = torch.Generator().manual_seed(seed)

    def draw():
        return -torch.rand(rows, T, generator=rng, dtype=torch.float64) * 3

    batch = {"old": draw(), "reference": draw(), "targets": torch.zeros(rows, T, dtype=torch.long)}
    batch["advantage"] = torch.randn(rows, 1, generator=rng, dtype=torch.float64)
    for row in range(rows):
        batch["targets"][row, : row % 3] = -100
        batch["targets"][row, T - row % 2 :] = -100
    batch["is_whole"] = torch.arange(rows) != 1  # which was cut off
    return draw().requires_grad_(), batch


def test_the_loss_is_that_of_the_paper():
    """Equation 3 of Shao et al. 2024, token by token, with its estimate of the divergence, equation 4."""
    logps, batch = random_batch(0)
    expected = 0.0
    for row in range(6):
        terms = []
        for t in range(7):
            if batch["targets"][row, t] == -100:
                continue
            ratio = torch.exp(logps[row, t]) / torch.exp(batch["old"][row, t])
            A = batch["advantage"][row, 0]
            low, high = 1 - 0.2, 1 + 0.2
            clipped = low if ratio < low else high if ratio > high else ratio
            gain = min(ratio * A, clipped * A) * batch["is_whole"][row]
            share = torch.exp(batch["reference"][row, t]) / torch.exp(logps[row, t])
            terms.append(gain - 0.3 * (share - torch.log(share) - 1))
        if terms:
            expected = expected - sum(terms) / len(terms)
    loss = ppo.policy_loss(logps, batch, 0.2, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    [gradient] = torch.autograd.grad(loss, logps)
    [exact] = torch.autograd.grad(expected, logps)
    torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-14)


def test_advantages_are_those_of_the_paper():
    """Equations 11 to 16 of Schulman et al. 2016 with a discount of 1, sums of differences written out."""
    rng = torch.Generator().manual_seed(4)
    values = torch.randn(3, 8, generator=rng, dtype=torch.float64)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    is_answer = torch.zeros(3, 8, dtype=bool)
    spans = [(2, 8), (0, 5), (3, 4)]
    for row, (first, end) in enumerate(spans):
        is_answer[row, first:end] = True
    for decay in (0.0, 0.9, 1.0):
        got = value_advantages(rewards, values, is_answer, decay)
        for row, (first, end) in enumerate(spans):
            later = [*values[row, first + 1 : end].tolist(), 0.0]
            reward = [0.0] * (end - first - 1) + [rewards[row].item()]
            deltas = [
                r + v - values[row, first + i].item() for i, (r, v) in enumerate(zip(reward, later))
            ]
            for i in range(end - first):
                expected = sum(decay**k * delta for k, delta in enumerate(deltas[i:]))
                assert got[row, first + i].item() == pytest.approx(expected, rel=1e-12)
        assert (got[~is_answer] == 0).all()


def test_the_loss_of_values_is_that_of_the_definition():
    logps, batch = random_batch(2)
    rng = torch.Generator().manual_seed(5)
    batch["value"], batch["goal"], values = (
        torch.randn(6, 7, generator=rng, dtype=torch.float64) for _ in range(3)
    )
    values.requires_grad_()
    expected = 0.0
    for row in range(6):
        terms = []
        for t in range(7):
            if batch["targets"][row, t] == -100 or not batch["is_whole"][row]:
                continue
            v, old, goal = values[row, t], batch["value"][row, t], batch["goal"][row, t]
            near = min(max(v, old - 0.2), old + 0.2)
            terms.append(max((v - goal) ** 2, (near - goal) ** 2) / 2)
        if terms:
            expected = expected + sum(terms) / len(terms)
    loss = ppo.value_loss(values, batch, 0.2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    [gradient], [exact] = (torch.autograd.grad(x, values) for x in (loss, expected))
    torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-14)
    whiten([batch | {"advantage": values.detach()}], CPU)
    batch["advantage"] = values.detach()
    whiten([batch], CPU)
    learned = batch["advantage"][is_learned(batch)]
    assert learned.mean().item() == pytest.approx(0, abs=1e-12)
    assert learned.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_advantages_need_no_float64_of_the_device():
    _, batch = random_batch(3)

    def advantages():
        batch["advantage"] = group_advantages(torch.arange(6.0), batch["is_whole"], 3, True).expand(
            batch["targets"].shape
        )
        whiten([batch], CPU)
        return batch["advantage"]

    expected = advantages()
    assert expected.isfinite().all() and expected.any()
    with WithoutFloat64():
        assert torch.equal(advantages(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [False, True])
def test_the_loss_and_its_gradient_are_those_of_trl(shop, tmp_path, scale):
    """Of one batch of samples, from weights that have moved away from those that sampled, and these from the
    reference. TRL's divergence is ours where it is not multiplied by the ratio, as it is by default.
    """
    import trl  # takes seconds

    prompts = ["a", "bc", "dab", "cd"]  # TRL's are padded on their left
    write_rows(shop / "unequal.jsonl", [{"prompt": prompt} for prompt in prompts])
    argv = [f"--dataset={shop}/unequal.jsonl", "--kl=0.3", f"--scale={scale}", "--max_new_tokens=13"]
    task = small_task(shop, *argv)
    model = task.tuning.model
    moved(model)
    [batch] = task.batches(0)
    rewards = [float(len(answer)) for answer in answers(task, batch)]  # few of a group are equal
    batch["is_whole"][:] = True  # TRL lets what was cut off count in the mean
    batch["advantage"] = group_advantages(torch.tensor(rewards), batch["is_whole"], 4, scale)
    moved(model)
    lora.merge(model)  # an ordinary model, of which all weights learn

    checkpoint_file.save(
        f"{tmp_path}/ckpt.pt", model, task.tuning.tokenizer, {}, checkpoint_file.RunState()
    )
    call(hf, f"--out_dir={tmp_path}", f"--to={tmp_path}/moved")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)
    config = trl.GRPOConfig(
        str(tmp_path / "trl"),
        beta=0.3,
        loss_type="grpo",
        use_bias_correction_kl=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        num_generations=4,
        per_device_train_batch_size=12,
        gradient_checkpointing=False,
    )
    trainer = trl.GRPOTrainer(
        peer,
        lambda completions, **_: [0.0] * len(completions),
        config,
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "moved"),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 12),
    )
    means = np.repeat(np.reshape(rewards, (3, 4)).mean(1), 4)
    deviations = np.repeat(np.reshape(rewards, (3, 4)).std(1, ddof=1), 4) + 1e-4
    advantages = (np.array(rewards) - means) / (deviations if scale else 1)
    assert advantages.any()
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(
        peer,
        padded_for_trl(batch) | {"advantages": torch.tensor(advantages, dtype=torch.float32)},
    )
    theirs.backward()

    is_learned = batch["targets"] != -100
    ratios = (ppo.token_logps(model, batch) - batch["old"]).exp()[is_learned]
    assert ratios.min() < 0.8 and ratios.max() > 1.2  # some are clipped
    loss = task.loss(model, batch) / 12
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    check_gradients(model, peer)


def answers(task, batch):
    """Returns the texts that were sampled."""
    tokenizer = task.tuning.tokenizer
    ids = [row[row != -100].tolist() for row in batch["targets"]]
    return [tokenizer.decode_more(row[:-1] if row[-1] == tokenizer.eot else row) for row in ids]


def padded_for_trl(batch):
    """Returns a batch of task.sample as TRL's trainer has it: prompts and answers apart, the former with their
    padding on the left.
    """
    targets = batch["targets"]
    spans = [row.nonzero()[[0, -1], 0].tolist() for row in targets != -100]
    width = max(first for first, _ in spans) + 1
    length = max(last + 1 - first for first, last in spans)
    n = len(targets)
    result = {
        "prompt_ids": torch.zeros(n, width, dtype=torch.long),
        "prompt_mask": torch.zeros(n, width, dtype=torch.long),
        "completion_ids": torch.zeros(n, length, dtype=torch.long),
        "completion_mask": torch.zeros(n, length, dtype=torch.long),
        "old_per_token_logps": torch.zeros(n, length),
        "ref_per_token_logps": torch.zeros(n, length),
    }
    for row, (first, last) in enumerate(spans):
        answer = slice(first, last + 1)
        tokens = last + 1 - first
        result["prompt_ids"][row, width - first - 1 :] = batch["idx"][row, : first + 1]
        result["prompt_mask"][row, width - first - 1 :] = 1
        result["completion_ids"][row, :tokens] = targets[row, answer]
        result["completion_mask"][row, :tokens] = 1
        result["old_per_token_logps"][row, :tokens] = batch["old"][row, answer]
        result["ref_per_token_logps"][row, :tokens] = batch["reference"][row, answer]
    return result


@pytest.mark.parametrize("baseline", ["group", "value"])
def test_the_loss_and_its_gradient_are_those_of_the_definition(shop, baseline):
    """In float64, a text at a time: log p by the model that sampled, by its base and by one that has moved, from
    the texts and rewards alone.
    """
    argv = [
        "--kl=0.3",
        f"--baseline={baseline}",
        "--gae=0.9",
        "--max_new_tokens=4",
    ]  # which words of five letters fill
    task = small_task(shop, *argv)
    model = task.tuning.model
    moved(model)
    sampler = copy.deepcopy(model).double()
    [batch] = task.batches(0)
    moved(model)
    exact = copy.deepcopy(model).double()
    loss = task.loss(model, batch)
    loss.backward()

    rewards = [task.reward("", answer) for answer in answers(task, batch)]
    whole = [
        int(targets[targets != -100][-1]) == task.tuning.tokenizer.eot for targets in batch["targets"]
    ]
    assert 3 < sum(whole) < 12
    texts = []  # (ids, the first sampled one's place)
    for idx, targets in zip(batch["idx"], batch["targets"]):
        first, last = (targets != -100).nonzero()[[0, -1], 0].tolist()
        texts.append(([*idx[: first + 1].tolist(), *targets[first : last + 1].tolist()], first + 1))

    def logps(of, ids, first):
        every = of(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[0]
        return torch.stack([every[t - 1, ids[t]] for t in range(first, len(ids))])

    def values(of, ids, first):
        states = of.hidden(torch.tensor([ids[:-1]])).detach()
        return of.value_head(states)[0, first - 1 :, 0]

    with torch.no_grad():
        old = [logps(sampler, *text) for text in texts]
        with lora.switched_off(sampler):
            reference = [logps(sampler, *text) for text in texts]
        if baseline == "value":
            before = [values(sampler, *text) for text in texts]
    advantages = []
    for row in range(12):
        if baseline == "group":
            group = [rewards[n] for n in range(row // 4 * 4, row // 4 * 4 + 4) if whole[n]]
            of_row = rewards[row] - np.mean(group) if whole[row] else 0.0
            deviation = np.std(group, ddof=1) if len(group) > 1 else 0.0
            advantages.append([of_row / (deviation + 1e-4)] * len(old[row]))
        else:
            v = [*before[row].tolist(), 0.0]
            n = len(v) - 1
            deltas = [v[t + 1] - v[t] + (rewards[row] if t == n - 1 else 0.0) for t in range(n)]
            advantages.append([sum(0.9 ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)])
    goals = advantages
    if baseline == "value":
        goals = [
            [a + v for a, v in zip(*row)] for row in zip(advantages, (row.tolist() for row in before))
        ]
        learned = [a for row in range(12) if whole[row] for a in advantages[row]]
        advantages = [[(a - np.mean(learned)) / np.std(learned) for a in row] for row in advantages]

    expected = 0.0
    for row, text in enumerate(texts):
        n = len(old[row])
        now = logps(exact, *text)
        for t in range(n):
            ratio = (now[t] - old[row][t]).exp()
            A = advantages[row][t]
            gain = min(ratio * A, min(max(ratio, 1 - 0.2), 1 + 0.2) * A) if whole[row] else 0.0
            share = (reference[row][t] - now[t]).exp()
            expected = expected - (gain - 0.3 * (share - share.log() - 1)) / n
        if baseline == "value" and whole[row]:
            for v, old_v, goal in zip(values(exact, *text), before[row], goals[row]):
                near = min(max(v, old_v - 0.2), old_v + 0.2)
                expected = expected + max((v - goal) ** 2, (near - goal) ** 2) / 2 / n
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    grads = dict(exact.named_parameters())
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(learned) > 10
    for name, p in learned:
        atol = 1e-4 * grads[name].grad.abs().max().item()
        torch.testing.assert_close(p.grad.double(), grads[name].grad, rtol=1e-3, atol=atol)


# What sampling hands over


def test_ratios_begin_at_1_and_the_divergence_at_0_to_the_bit(shop):
    task = small_task(shop)
    [batch] = task.batches(0)
    is_learned = batch["targets"] != -100
    assert is_learned.sum() > 20
    logps = ppo.token_logps(task.trained, batch)
    assert torch.equal(logps[is_learned], batch["old"][is_learned])
    assert torch.equal(logps[is_learned], batch["reference"][is_learned])
    moved(task.tuning.model)
    assert (ppo.token_logps(task.trained, batch) - batch["old"])[is_learned].abs().max() > 1e-3
    [again] = task.batches(1)  # other samples, and the reference does not move
    is_learned = again["targets"] != -100
    assert (again["old"] - again["reference"])[is_learned].abs().max() > 1e-3
    assert torch.equal(ppo.token_logps(task.trained, again)[is_learned], again["old"][is_learned])


def test_samples_are_drawn_from_the_whole_distribution_without_dropout(shop):
    """Then log p of a token is less than the mean over all tokens as often as more: their sum has the deviation of
    independent draws.
    """
    task = small_task(shop, "--lora_dropout=0.5", "--max_new_tokens=24")
    model = task.tuning.model.train()
    moved(model)
    for scale in 0.3, 2.0:  # all tokens are likely, and twice as unequal
        model.head.weight.data *= scale
        batch, _, drift = task.sample(task.prompts * 20, (1, 2))
        assert drift < 1e-4
        with torch.no_grad():
            logps = model.eval()(batch["idx"])[0].double().log_softmax(-1)
        model.train()
        is_sampled = batch["targets"] != -100
        logps = logps[is_sampled]
        sampled = logps.gather(1, batch["targets"][is_sampled][:, None])[:, 0]
        torch.testing.assert_close(sampled.float(), batch["old"][is_sampled], rtol=1e-4, atol=1e-4)
        p = logps.exp()
        mean = (p * logps).sum(-1)
        variance = (p * (logps - mean[:, None]).square()).sum()
        assert abs((sampled - mean).sum()) < 3 * variance.sqrt()


def test_log_p_is_that_of_each_sampled_token_and_of_the_end():
    model = build(vocab_size=12, block_size=24, n_layer=1).double().eval()
    prompts = [[1, 2, 3], [4], [5, 6]]
    *_, rows = generate(model, prompts, 15, 1.0, top_k=0, stop=[0], seed=5, logps=True)
    assert {row.end for row in rows} == {"stop", "length"}
    for prompt, row in zip(prompts, rows):
        text = prompt + row.ids + [0] * (row.end == "stop")
        logps = model(torch.tensor([text[:-1]]))[0].log_softmax(-1)[0]
        expected = logps[range(len(text) - 1), text[1:]][len(prompt) - 1 :]
        assert row.logps == pytest.approx(expected.tolist(), abs=1e-5)
        assert row.stop == (0 if row.end == "stop" else None)


def test_several_steps_on_the_same_samples_go_on_with_the_prompts_that_come_next(shop):
    twice, once = (small_task(shop, f"--updates={n}") for n in (2, 1))
    for step in range(4):
        [batch], [expected] = twice.batches(step), once.batches(step // 2)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    twice.compute = replace(twice.compute, world_size=2)
    with pytest.raises(Refusal, match="several processes take one step on their samples"):
        twice.begin()


def test_the_drift_is_that_of_all_samples_so_far(shop):
    task = small_task(shop)
    sample = task.sample
    drifts = iter([0.5, 0.25])
    task.sample = lambda *args: (*sample(*args)[:2], next(drifts))
    task.batches(0)
    task.batches(1)
    task.sample = sample
    assert task.validate()["drift"] == task.notes()["drift"] == 0.5
    task.drift = 0.0
    assert 0 < task.validate()["drift"] < 1e-4


def test_the_logged_divergence_is_the_mean_of_all_sampled_tokens(shop):
    """In float64, a text at a time; of answers that were cut off, too."""
    task = small_task(shop, "--max_new_tokens=4")
    model = task.tuning.model
    moved(model)
    sample = task.sample
    batches = []

    def noted(*args):
        result = sample(*args)
        batches.append(result[0])
        return result

    task.sample = noted
    figures = task.validate()
    exact = copy.deepcopy(model).double()
    estimates, whole = [], []
    for row in range(len(task.val_prompts)):
        batch = batches[row // 12]
        idx, targets = batch["idx"][[row % 12]], batch["targets"][row % 12]
        places = (targets != -100).nonzero()[:, 0]
        whole.append(targets[places[-1]] == task.tuning.tokenizer.eot)
        with torch.no_grad():
            logps = exact(idx)[0].log_softmax(-1)[0, places, targets[places]]
            with lora.switched_off(exact):
                reference = exact(idx)[0].log_softmax(-1)[0, places, targets[places]]
        for now, before in zip(logps.tolist(), reference.tolist()):
            share = math.exp(before) / math.exp(now)
            estimates.append(share - 1 - math.log(share))
    assert 0 < sum(whole) < len(whole) == 100
    assert figures["cut_off"] == pytest.approx(1 - np.mean(whole))
    assert figures["kl"] == pytest.approx(np.mean(estimates), rel=1e-3)
    assert f" {figures['kl']:.4f} nats a token from the reference" in task.line(figures)


def test_the_dropout_of_the_base_ends_and_that_of_adapters_stays(shop):
    """The model that learns would else be another one than that which sampled and than the reference."""
    base = torch.load(shop / "base/ckpt.pt", weights_only=True)
    base["model_config"]["dropout"] = 0.3
    (shop / "dropping").mkdir()
    torch.save(base, shop / "dropping/ckpt.pt")
    for rate in 0.0, 0.5:
        task = small_task(shop, f"--init_from={shop}/dropping", f"--lora_dropout={rate}")
        model = task.tuning.model.train()
        moved(model)
        [batch] = task.batches(0)
        is_sampled = batch["targets"] != -100
        learned = ppo.token_logps(model, batch)[is_sampled]
        assert torch.equal(learned, batch["old"][is_sampled]) == (rate == 0)
        with lora.switched_off(model):
            reference = ppo.token_logps(model, batch)[is_sampled]
        assert torch.equal(reference, batch["reference"][is_sampled])


def test_answers_that_are_cut_off_are_counted_and_not_learned(shop):
    task = small_task(shop, "--max_new_tokens=4")
    [batch] = task.batches(0)
    ended = [(row == task.tuning.tokenizer.eot).any() for row in batch["targets"]]
    assert batch["is_whole"].tolist() == ended and 0 < sum(ended) < 12
    assert task.validate()["cut_off"] > 0
    batch = batch | {"advantage": torch.ones(12, 1)}
    loss = task.loss(task.trained, batch)
    assert loss.item() == pytest.approx(-sum(ended))  # a ratio of 1 each


@pytest.mark.parametrize("scale", [False, True])
def test_what_was_cut_off_has_no_advantage_and_gives_none(scale):
    is_whole = torch.tensor([True, True, False, True, False, True, False, False])
    for reward in (0.0, 9.0):  # of those that were cut off
        rewards = [1.0, 4.0, reward, 1.0, reward, 5.0, reward, reward]
        expected = np.array([-1, 2, 0, -1, 0, 0, 0, 0]) / (
            np.std([1, 4, 1], ddof=1) + 1e-4 if scale else 1
        )
        got = group_advantages(torch.tensor(rewards), is_whole, 4, scale)
        np.testing.assert_allclose(got[:, 0], expected, rtol=1e-6)


def test_built_in_rewards_by_hand():
    length, match, toy = map(find_reward, ("length:4", "match:b+c", "toy"))
    assert [length("ab", answer) for answer in ("", "abc", "abcd", "abcdef")] == [-1, -0.25, 0, -0.5]
    assert [match("bc", answer) for answer in ("abbcd", "ac", "bc", "")] == [1, 0, 1, 0]
    for row in toy_stories.preference_rows(20, seed=5):
        assert [toy(row["prompt"], row[side]) for side in ("chosen", "rejected")] == [1, 0]
        assert toy("", row["chosen"]) == 0  # without its beginning


def test_groups_have_the_same_prompt_and_advantages_their_own_mean(shop):
    task = small_task(shop)
    [batch] = task.batches(0)
    groups = batch["idx"].view(3, 4, -1)
    assert (groups[:, :, :2] == groups[:, :1, :2]).all()  # end of text, and a letter
    assert len({row[1] for row in groups[:, 0].tolist()}) > 1
    assert batch["advantage"].view(3, 4).mean(1).abs().max() < 1e-6
    assert batch["advantage"].abs().max() > 0


# Learning


class Bandit(torch.nn.Module):
    """Tokens by a table of logits: the next one depends on the one before alone."""

    def __init__(self, n):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(n, n))

    def forward(self, idx, targets, reduction):
        logits = self.table[idx]
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        return logits, nats.view_as(targets)


@pytest.mark.parametrize("baseline", ["group", "value"])
@pytest.mark.parametrize("length, steps", [(1, 60), (2, 120)])
def test_the_best_arm_is_found(length, steps, baseline):
    """One token of four, of which token 3 is best; and a chain of two, rewarded where it is 2 then 3 alone."""
    torch.manual_seed(0)
    model = Bandit(4)
    worth = torch.nn.Embedding(
        4, 1
    )  # of the token before, as far as a chain's first token is that of its end
    optimizer = torch.optim.Adam([*model.parameters(), *worth.parameters()], lr=0.1)
    for _ in range(steps):
        idx = torch.zeros(64, length + 1, dtype=torch.long)
        for t in range(length):
            p = model.table[idx[:, t]].softmax(-1)
            idx[:, t + 1] = torch.multinomial(p.detach(), 1)[:, 0]
        last = idx[:, 1:]
        rewards = last[:, 0] / 3 if length == 1 else (last == torch.tensor([2, 3])).all(1).float()
        batch = {"idx": idx[:, :-1], "targets": last, "is_whole": torch.ones(64, dtype=bool)}
        batch["old"] = batch["reference"] = ppo.token_logps(model, batch).detach()
        if baseline == "group":
            batch["advantage"] = group_advantages(rewards, batch["is_whole"], 64)
        else:
            batch["value"] = worth(batch["idx"])[..., 0].detach()
            is_answer = torch.ones_like(last, dtype=bool)
            batch["advantage"] = value_advantages(rewards, batch["value"], is_answer, 0.95)
            batch["goal"] = batch["value"] + batch["advantage"]
            whiten([batch], CPU)
        for _ in range(2):
            loss = ppo.policy_loss(ppo.token_logps(model, batch), batch, 0.2, 0.0)
            if baseline == "value":
                loss = loss + ppo.value_loss(worth(batch["idx"])[..., 0], batch, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    p = model.table.softmax(-1)
    best = p[0, 3] if length == 1 else p[0, 2] * p[2, 3]
    assert best > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["group", "value"])
def test_reward_rises(shop, baseline):
    argv = [
        f"--baseline={baseline}",
        "--group=8",
        "--max_new_tokens=14",
        "--kl=0.3",
        "--learning_rate=2e-3",
        "--max_iters=30",
        "--eval_interval=30",
    ]
    reinforce(shop, *argv, f"--out_dir=rises-{baseline}")
    first, *_, last = [line for line in log(shop, f"rises-{baseline}") if "reward" in line]
    assert last["reward"] > first["reward"] + 0.1
    assert (
        last["cut_off"] < 0.3
    )  # never to end is the other way to write no e, and counts as writing one
    assert first["kl"] == 0 and last["kl"] > 0


# Runs


@pytest.mark.parametrize(
    "updates, baseline",
    [(1, "group"), pytest.param(3, "group", marks=pytest.mark.slow), (3, "value")],
)
def test_stop_and_resume_is_an_uninterrupted_run_to_the_bit(shop, updates, baseline):
    argv = [
        f"--updates={updates}",
        f"--baseline={baseline}",
        "--lora_dropout=0.2",
        "--gradient_accumulation_steps=2",
    ]
    whole_dir, parts_dir = f"whole{updates}{baseline}", f"parts{updates}{baseline}"
    reinforce(shop, *argv, f"--out_dir={whole_dir}")
    reinforce(shop, *argv, f"--out_dir={parts_dir}", "--max_iters=4", "--lr_decay_iters=8")
    call(ppo, f"--out_dir={parts_dir}", "--init_from=resume", "--max_iters=8", folder=shop)
    whole, parts = (
        checkpoint_file.load(str(shop / folder / "adapter.pt"), checkpoint_file.ADAPTER_KEYS)
        for folder in (whole_dir, parts_dir)
    )
    for key in "adapters", "optimizers", "val_loss", "best_val_loss", "step":
        assert same(whole[key], parts[key]), key
    assert log(shop, whole_dir) == log(shop, parts_dir)


@pytest.mark.parametrize("baseline", ["group", "value"])
def test_two_processes_are_one(shop, baseline):
    """Also in how they whiten advantages."""
    one_and_two(shop, ppo, f"--baseline={baseline}", *REWARDED, "--dataset=prompts.jsonl")


@pytest.mark.slow
def test_a_compiled_run_is_the_same(shop):
    compiled_is_the_same(shop, ppo, *REWARDED, *PROMPTS, "--baseline=value", "--updates=2")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--group=1"], "one sample a group has nothing to be compared with"),
        (["--rank=0"], "the reference is the base without its adapters"),
        (["--reward=nice"], "reward must be toy, length:CHARACTERS, match:"),
        (["--reward=match:("], "is no regular expression"),
        (["--reward=match:a{99999999999}"], "is no regular expression"),
        (["--reward=length:0"], "reward must be toy"),
        (["--clip=1"], "clip must be above 0 and below 1"),
        (["--updates=0"], "updates must be at least 1"),
    ],
)
def test_mistakes_are_one_line(shop, argv, message):
    with pytest.raises(Refusal) as refusal:
        reinforce(shop, "--out_dir=refused", *argv)
    assert message in str(refusal.value) and not (shop / "refused").exists()


@pytest.mark.parametrize("value, updates", [(float("nan"), 2), ([1.0, 2.0], 1), (None, 2)])
def test_a_reward_that_is_no_number_ends_the_run_which_loses_nothing(shop, monkeypatch, value, updates):
    out_dir = f"refused-{type(value).__name__}"
    judged = []

    def judge(prompt, answer):
        judged.append(answer)
        if len(judged) > limit and value is None:
            raise KeyError("verdict")
        return value if len(judged) > limit else float("e" not in answer)

    monkeypatch.setattr(ppo, "find_reward", lambda name, device="cpu", load=False: judge)
    limit = 140  # of 100 held-out prompts and 24 samples a step or two: within a micro-batch's
    settings = ["--gradient_accumulation_steps=2", f"--updates={updates}", "--eval_interval=8"]
    reason = r"(gives (nan|\[1.0, 2.0\])|fails with KeyError\('verdict'\))"
    with pytest.raises(Refusal, match=reason + r" for .*has all steps up to \d+: --init_from=resume"):
        reinforce(shop, *settings, f"--out_dir={out_dir}")
    assert adapter(shop, out_dir)["step"] == updates
    limit = math.inf
    call(ppo, f"--out_dir={out_dir}", "--init_from=resume", folder=shop)
    reinforce(shop, *settings, f"--out_dir=accepted-{out_dir}")
    assert same(adapter(shop, out_dir)["adapters"], adapter(shop, f"accepted-{out_dir}")["adapters"])
    assert log(shop, out_dir) == log(shop, f"accepted-{out_dir}")


@pytest.mark.parametrize(
    "rewards, steps", [(100 + 2 * 12, 2), pytest.param(100 + 8 * 12, 8, marks=pytest.mark.slow)]
)
def test_a_reward_that_is_none_in_one_process_ends_both_and_loses_nothing(shop, rewards, steps):
    """While it samples to learn, or in the evaluation after the last step."""
    argv = [*TINY, *REWARDED, "--init_from=base", *PROMPTS, "--eval_interval=8", "--baseline=value"]
    argv += ["--gradient_accumulation_steps=2", "--overwrite"]
    faults = None, ("reward", rewards + 1)  # of held-out prompts and micro-batches
    processes = [
        start(shop, "finetune_ppo", *argv, "--out_dir=one-fails", fault=fault, **env)
        for fault, env in zip(faults, ranks(2))
    ]
    assert [finish(process, 60) for process in processes] == [1, 1]
    reasons = ["a reward of another process is none, which says so", "gives nan for "]
    for process, reason in zip(processes, reasons):
        *_, line = error_output(shop, process).splitlines()
        assert reason in line and error_output(shop, process).count("finetune_ppo.py: ") == 1
        assert line.endswith(f"one-fails has all steps up to {steps}: --init_from=resume goes on")
    call(ppo, "--out_dir=one-fails", "--init_from=resume", folder=shop)
    call(ppo, *argv, "--out_dir=none-fails", folder=shop)
    assert same(adapter(shop, "one-fails")["adapters"], adapter(shop, "none-fails")["adapters"])
    lines = log(shop, "none-fails")
    assert log(shop, "one-fails") == (
        lines if steps < 8 else lines[:-1]
    )  # its evaluation is printed alone


def test_an_answer_that_was_cut_off_counts_as_the_worst(shop):
    task = small_task(shop, "--max_new_tokens=1")
    task.judge = lambda prompt, answer: 1.0
    figures = task.validate()
    assert figures["cut_off"] > 0.5
    assert figures["reward"] == pytest.approx(1 - figures["cut_off"])
    task.judge = lambda prompt, answer: -2.0
    assert task.validate()["reward"] == -2


def test_no_reward_is_a_loss_of_zero_without_a_sign(shop):
    task = small_task(shop, "--max_new_tokens=1")
    task.judge = lambda prompt, answer: 0.0
    assert f"{task.validate()['val_loss']:.4f}" == "0.0000"


def test_prompts_are_read_from_rows_of_every_kind_without_an_answer(shop):
    task = small_task(shop)
    message = {"role": "user", "content": "ab"}
    answer = {"role": "assistant", "content": "c"}
    rows = [
        {"prompt": "ab"},
        {"prompt": [message]},
        {"messages": [message]},
        {"messages": [message, answer]},
        {"instruction": "ab"},
        {"prompt": "ab", "chosen": "c", "rejected": "d"},
        {"chosen": [message, answer], "rejected": [message]},
    ]
    prompts, _ = task.read_prompts(task.convert([("here", row) for row in rows]), "to learn from")
    assert [prompt for prompt, _ in prompts] == ["ab"] * 7
    rows = [{"messages": [answer]}, rows[0], {"prompt": "ab" * 99}]
    _, line = task.read_prompts(task.convert([(f"row {n}", row) for n, row in enumerate(rows)]), "held")
    length = task.tuning.T
    assert line.endswith(
        "held: 1 rows; left out: 1 that begin with an answer (row 0), "
        f"1 that leave no room in {length} tokens (row 2)"
    )
    # end of text comes before it, and one token of an answer after it
    most = [(f"{n} letters", {"prompt": "e" * n}) for n in (length - 2, length - 1)]
    [(_, ids)], line = task.read_prompts(task.convert(most), "held")
    assert len(ids) == length - 1 and f"tokens ({length - 1} letters)" in line


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab", "response": "c"},
        {"prompt": "ab", "completion": "c"},
        {"instruction": "ab", "output": "c", "prompt": "all of it: ab c"},
        {"prompt": "b", **chat(("user", "ab"), ("assistant", "c"))},
        {"prompt": chat(("user", "ab"))["messages"], "completion": chat(("assistant", "c"))["messages"]},
    ],
)
def test_a_row_has_the_prompt_that_finetune_lora_reads_and_its_template(shop, row):
    [learned] = conversations([("here", row)])
    task = small_task(shop)
    [prompt] = task.convert([("here", row)])
    assert default_template([prompt]) == default_template([learned])
    assert prompt_messages(prompt) == chat_messages(learned.messages[:-1])


@pytest.mark.parametrize("key, side", [("dataset", "to learn from"), ("val_dataset", "held out")])
def test_a_file_without_prompts_is_named(shop, key, side):
    (shop / "none.json").write_text("[]")
    with pytest.raises(Refusal, match=f"^none.json, {side}: there is no row in it"):
        reinforce(shop, f"--{key}=none.json", "--out_dir=there")


TEXTS = {"chosen": "c", "rejected": "d"}
WHOLE = {side: chat(("user", "ab"), ("assistant", text))["messages"] for side, text in TEXTS.items()}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab", **TEXTS},
        {"instruction": "a", "input": "b", **TEXTS},
        {"prompt": chat(("user", "ab"))["messages"], **WHOLE},
        WHOLE,
        {"prompt": "b", **WHOLE},
        {"instruction": "b", "prompt": None, **WHOLE},
    ],
)
def test_a_pair_has_the_prompt_that_finetune_dpo_reads_and_its_template(shop, row):
    [[learned, _]] = preferences([("here", row)])
    [prompt] = small_task(shop).convert([("here", row)])
    assert default_template([prompt]) == default_template([learned])
    assert prompt_messages(prompt) == chat_messages(learned.messages[:-1])


def test_the_prompt_of_a_conversation_is_all_before_its_last_answer(shop):
    task = small_task(shop, "--template=<{prompt}>")
    before = chat(("system", "be"), ("user", "ab"), ("assistant", "c"), ("user", "ba"))["messages"]
    rows = [
        {"messages": before},
        {"messages": [*before, {"role": "assistant", "content": "cc"}]},
        {"prompt": before},
        {
            "conversations": [
                {"from": message["role"], "value": message["content"]} for message in before
            ]
        },
    ]
    tokenizer = task.tuning.tokenizer
    ids = [tokenizer.eot, *tokenizer.encode("<be\nab>c"), tokenizer.eot, *tokenizer.encode("<ba>")]
    prompts, _ = task.read_prompts(task.convert([("here", row) for row in rows]), "to learn from")
    assert prompts == [(before, ids)] * 4


def test_an_empty_system_message_is_a_part_of_a_prompt(shop):
    task = small_task(shop)
    before = chat(("system", ""), ("user", "ab"))["messages"]
    rows = [("here", {"prompt": before}), ("there", {"prompt": before[:1]})]
    [(prompt, _)], line = task.read_prompts(task.convert(rows), "held")
    assert prompt == before
    assert line.endswith("left out: 1 without a prompt (there)")


def test_only_a_users_message_is_judged_as_a_text(shop):
    """A reward model, which would take a text for a user's, was taught the roles of a conversation."""
    task = small_task(shop)
    for role in "user", "system":
        before = chat((role, "ab"))["messages"]
        [(prompt, _)], _ = task.read_prompts(task.convert([("here", {"prompt": before})]), "held")
        assert prompt == ("ab" if role == "user" else before)


def test_a_run_keeps_its_baseline_its_reward_and_its_prompts(shop):
    write_rows(shop / "own.jsonl", [{"prompt": letter} for letter in "abc"])
    reinforce(shop, "--dataset=own.jsonl", "--max_iters=1", "--out_dir=kept")
    for other in "--baseline=value", "--reward=length:3":
        with pytest.raises(Refusal, match=other.partition("=")[0].removeprefix("--")):
            call(ppo, "--out_dir=kept", "--init_from=resume", other, folder=shop)
    write_rows(shop / "own.jsonl", [{"prompt": letter} for letter in "abd"])
    with pytest.raises(Refusal, match="own.jsonl holds other rows than when"):
        call(ppo, "--out_dir=kept", "--init_from=resume", "--max_iters=2", folder=shop)


def test_other_prompts_than_toy_stories_need_a_reward(shop):
    with pytest.raises(Refusal, match="reward=toy judges toy stories"):
        call(ppo, *TINY, "--init_from=base", *PROMPTS, "--out_dir=there", folder=shop)
    assert not (shop / "there").exists()


def test_equal_rewards_teach_nothing():
    for reward in 1 / 3, 0.7, -1.1:
        advantages = group_advantages(torch.full((8,), reward), torch.ones(8, dtype=torch.bool), 8, True)
        assert not advantages.any()
