"""Comparisons: fair budgets, matched sizes, what is a difference and what is none, going on where one stopped."""

import contextlib
import json
import math
import os
import shutil
import signal
import warnings

import numpy as np
import pytest
from scripts import call, shell

import compare
import compare_job
import eval as evaluation
import folders
import prepare
import train
from compare_report import notes, verdict
from config import Refusal, configure
from device import resolve
from lenses import likelihood, stats
from sizes import model_sizes

SMALL = [
    "--n_layer=1",
    "--n_embd=16",
    "--n_head=2",
    "--n_kv_head=0",
    "--block_size=32",
    "--batch_size=2",
    "--budget=8",
    "--eval_interval=4",
    "--log_interval=2",
    "--eval_tokens=64",
    "--device=cpu",
    "--dtype=float32",
]
PAIR = "--variants=good: --learning_rate=1e-2; bad: --learning_rate=1e-5"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a small data/toy prepared."""
    folder = tmp_path_factory.mktemp("lab")
    call(prepare, "--num_stories=300", "--num_proc=1", "--vocab_size=300", folder=folder)
    return folder


@pytest.fixture(scope="module")
def pair(lab):
    """The folder of a comparison of a good and a bad learning rate, three seeds, in one go."""
    call(compare, *SMALL, PAIR, "--seeds=1,2,3", "--out_dir=out/pair$^$", folder=lab)
    return lab / "out/pair$^$"


def comparison(lab, *argv):
    """Returns the Comparison of a command line; its folder is relative to lab."""
    with contextlib.chdir(lab):
        return compare.Comparison(configure(compare.Config, [*SMALL, *argv]))


def results(folder):
    """Returns the lines of results.jsonl without what depends on the clock."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    measured = ("tokens_per_s", "seconds", "peak_bytes")
    return [{key: v for key, v in json.loads(line).items() if key not in measured} for line in lines]


def test_the_better_side_is_told(pair):
    table = (pair / "table.md").read_text()
    assert "- bad against good: worse by " in table and " bits a byte (3 seeds)" in table
    runs = [(row["variant"], row["seed"]) for row in results(pair)]
    assert runs == [(name, seed) for name in ("good", "bad") for seed in (1, 2, 3)]
    assert (pair / "curves.png").stat().st_size > 10_000


def test_a_loss_is_that_of_eval(lab, pair):
    [row] = [row for row in results(pair) if (row["variant"], row["seed"]) == ("bad", 2)]
    cfg = configure(
        evaluation.Config, [f"--out_dir={pair}/runs/bad-2", "--device=cpu", "--dtype=float32"]
    )
    compute = resolve("cpu", "float32", "false")
    with contextlib.chdir(lab):
        [subject], validation = evaluation.load_subjects(cfg, compute)
    documents, closed = likelihood.split_documents(*validation)
    figures, _ = likelihood.measure(subject, documents, closed, compute, cfg)
    assert row["bits_per_byte"] == pytest.approx(figures["bits_per_byte"], rel=1e-9)
    assert row["nats"] == pytest.approx(figures["loss"], rel=1e-9)


@pytest.mark.parametrize("place", ["in a step", pytest.param("before judging", marks=pytest.mark.slow)])
def test_an_interrupted_comparison_ends_as_an_uninterrupted_one(lab, pair, monkeypatch, place):
    argv = [*SMALL, PAIR, "--seeds=1,2,3", f"--out_dir=out/{place.replace(' ', '_')}"]
    calls = 0

    def interrupting(function, at):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                signal.raise_signal(signal.SIGINT)
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        if place == "in a step":  # the third of the second run
            patch.setattr(train, "train_step", interrupting(train.train_step, 8 + 3))
        else:
            patch.setattr(compare_job, "judge", interrupting(compare_job.judge, 2))
        with pytest.raises((Refusal, KeyboardInterrupt)) as stopped:
            call(compare, *argv, folder=lab)
    if place == "in a step":
        assert "the same command goes on" in str(stopped.value) and stopped.value.status == 130
    call(compare, *argv, folder=lab)
    assert results(lab / argv[-1].removeprefix("--out_dir=")) == results(pair)


@pytest.mark.slow
def test_processes_share_the_runs(lab, pair):
    argv = [*SMALL, PAIR, "--seeds=1,2,3", "--out_dir=out/shared", "--devices=cpu,cpu"]
    process = shell("compare", *argv, folder=lab)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("run ") == 6  # each once, whoever did it
    assert results(lab / "out/shared") == results(pair)


def test_a_run_in_use_is_left_to_the_process_that_has_it(lab):
    [job] = comparison(lab, "--variants=a:", "--seeds=1").runs()
    with contextlib.chdir(lab):
        with folders.alone(job.folder), pytest.raises(folders.InUse):
            job.run("1 of 1")
        assert job.read() is None


@pytest.mark.slow
def test_a_variant_beside_itself_is_seldom_different(lab):
    seeds = range(120)
    argv = ["--variants=a: --learning_rate=1e-2", f"--seeds={','.join(map(str, seeds))}"]
    call(compare, *SMALL, *argv, "--out_dir=out/itself", folder=lab)
    losses = {row["seed"]: row["bits_per_byte"] for row in results(lab / "out/itself")}
    verdicts = []
    for first in range(0, 120, 6):  # 20 comparisons of three seeds with three others
        sides = [{i: losses[first + side + i] for i in range(3)} for side in (0, 3)]
        verdicts.append(verdict(*sides))
    assert len(verdicts) == 20
    assert sum("no difference" not in text for text in verdicts) <= 2


@pytest.mark.slow
def test_the_sweep_gives_everyone_the_same_trials_and_takes_the_best(lab):
    argv = ["--variants=a:;b: --norm=layernorm", "--sweep=learning_rate:1e-5,1e-2 warmup_iters:2,4"]
    argv += ["--seeds=7", "--sweep_budget=0.5", "--out_dir=out/sweep"]
    call(compare, *SMALL, *argv, folder=lab)
    trials = [json.loads(path.read_text()) for path in (lab / "out/sweep/trials").glob("*.json")]
    for name in "ab":
        own = [trial["result"] for trial in trials if trial["result"]["variant"] == name]
        assert sorted(list(trial["values"].values()) for trial in own) == [
            [1e-5, 2],
            [1e-5, 4],
            [1e-2, 2],
            [1e-2, 4],
        ]
        assert {trial["steps"] for trial in own} == {4} and {trial["seed"] for trial in own} == {7}
        best = min(own, key=lambda trial: trial["bits_per_byte"])
        [row] = [row for row in results(lab / "out/sweep") if row["variant"] == name]
        assert row["values"] == best["values"] and row["values"]["learning_rate"] == 1e-2
        settings = json.loads((lab / f"out/sweep/runs/{name}-7.json").read_text())["settings"]
        assert (settings["learning_rate"], settings["max_iters"]) == (1e-2, 8)
    assert not list((lab / "out/sweep/trials").glob("*/*.pt"))


def test_what_diverges_is_named_and_no_trial_of_it_is_taken(lab):
    argv = ["--variants=a:; b: --grad_clip=0 --learning_rate=1e30 --warmup_iters=0", "--seeds=1"]
    call(compare, *SMALL, *argv, "--budget=20", "--out_dir=out/diverged", folder=lab)
    table = (lab / "out/diverged/table.md").read_text()
    assert "| b | diverged |" in table and "b against a: no seed of which both runs ended" in table


@pytest.mark.parametrize(
    "variant",
    ["configs/gpt.toml", "--mlp=gelu", "--n_kv_head=1", "--tie_embeddings=true", "--bias=true"],
)
def test_parameters_are_matched(lab, variant):
    size = ["--n_embd=64", "--n_head=4", "--n_layer=4", "--vocab_size=300"]
    folder = lab / "configs"
    if not folder.exists():
        folder.symlink_to(compare.__file__.removesuffix("compare.py") + "configs")
    variants = comparison(lab, *size, f"--variants=a: configs/llama.toml; b: {variant}").variants
    sizes = [model_sizes(cfg).parameters for cfg in variants.values()]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.01
    free = comparison(lab, *size, f"--variants=a:; b: {variant} --n_inner=24").variants["b"]
    assert free.n_inner == 24


def test_tokens_and_seconds_are_the_same_for_all(lab, monkeypatch):
    monkeypatch.setattr(compare, "TIMING_STEPS", 20)
    argv = ["--variants=a:; b: --batch_size=4", "--seeds=1"]
    for job in comparison(lab, *argv, "--by=tokens", "--budget=1280").runs():
        assert job.cfg.max_iters * job.cfg.batch_size * 32 == 1280
    argv += ["--by=seconds", "--budget=0.05", "--out_dir=out/seconds"]
    call(compare, *SMALL, *argv, folder=lab)
    for name, batch_size in (("a", 2), ("b", 4)):
        timings = [
            json.loads((lab / f"out/seconds/timings/{name}-{i}.json").read_text()) for i in (0, 1)
        ]
        speed = sum(timing["result"]["tokens_per_s"] for timing in timings) / 2
        [row] = [row for row in results(lab / "out/seconds") if row["variant"] == name]
        assert row["steps"] == max(1, round(0.05 * speed / (batch_size * 32)))


@pytest.mark.parametrize(
    "by, budget, words", [("tokens", "1234567", "tokens, 1,234,567"), ("seconds", "0.5", "seconds, 0.5")]
)
def test_the_budget_is_told_in_full(lab, by, budget, words):
    compared = comparison(lab, "--variants=a:", f"--by={by}", f"--budget={budget}")
    assert f"Equal: {words} a run." in "".join(notes(compared, {}))


def test_the_order_is_fair_to_a_machine_that_slows_down():
    order = [name for _, name in compare.there_and_back([1, 2, 3, 4], ["a", "b", "c"])]
    places = {name: [i for i, other in enumerate(order) if other == name] for name in "abc"}
    assert {sum(indices) for indices in places.values()} == {4 * 5.5}


def test_students_t():
    def share(t, n):  # of the distribution with n degrees of freedom between -t and t, by Simpson's rule
        x = np.linspace(-t, t, 200_001)
        density = (1 + x * x / n) ** (-(n + 1) / 2)
        density *= math.gamma((n + 1) / 2) / math.sqrt(n * math.pi) / math.gamma(n / 2)
        weights = np.r_[1, np.tile([4, 2], 99_999), 4, 1]
        return (weights * density).sum() * (x[1] - x[0]) / 3

    for n, t in enumerate(stats.T95, 1):
        assert share(t, n) == pytest.approx(0.95, abs=5e-5)


def test_the_interval_is_of_paired_differences():
    losses = {1: 1.0, 2: 2.0, 3: 3.0}
    others = {1: 0.9, 2: 1.8, 3: 2.8, 4: 9.0}
    mean, half, n = stats.paired(losses, others)
    assert n == 3
    assert mean == pytest.approx(0.5 / 3)
    assert half == pytest.approx(4.303 * np.std([0.1, 0.2, 0.2], ddof=1) / math.sqrt(3))
    assert verdict(losses, others) == "worse by 0.1667 +- 0.1434 bits a byte (3 seeds)"
    assert verdict(others, losses) == "better by 0.1667 +- 0.1434 bits a byte (3 seeds)"
    assert "no difference that 2 seeds" in verdict({1: 1.0, 2: 2.0}, {1: 0.9, 2: 1.95})
    assert "one seed does not show" in verdict({1: 1.0}, {1: 2.0})
    assert verdict({1: None}, {1: 2.0}) == "no seed of which both runs ended; 1 runs diverged"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--variants="], "there is nothing to compare"),
        (["--variants=a"], "'a' is no NAME: overrides"),
        (["--variants=a/b: --bias=true"], "is no NAME: overrides"),
        (["--variants=a:;a: --bias=true"], "two are called a"),
        (["--variants=a: --start='"], "a: No closing quotation"),
        (["--variants=a:; b: --n_head=3"], "variant b: n_embd=16 must be a multiple of n_head=3"),
        (
            ["--variants=a:; b: --n_heads=2"],
            "variant b: command line: there is no key 'n_heads'; did you mean n_head",
        ),
        (
            ["--variants=a:; b: --max_iters=3"],
            "variant b: max_iters is not to be set here: --budget says",
        ),
        (["--variants=a:; b: --dataset=none"], "variant b: there is no dataset data/none"),
        (["--variants=a:", "--seeds=1,1"], "seeds: 1 is given twice"),
        (["--variants=a:", "--seeds=1,b"], "seeds must be an integer, not 'b'"),
        (["--variants=a:", f"--seeds=1,{10**23}"], "seeds must be at least -2^63"),
        (["--variants=a:", "--seed=1"], "seed is not to be set here: --seeds names them"),
        (["--variants=a:", "--max_iters=1"], "--budget says how long a run is"),
        (["--variants=a:", "--budget=0"], "a budget of 0 steps trains nothing"),
        (["--variants=a:", "--budget=1e300"], "budget must be below 9e15 steps, not 1e+300"),
        (["--variants=a:", "--by=hours"], "by must be one of steps | tokens | seconds"),
        (
            ["--variants=a:", "--sweep=lr:1"],
            "there is no key 'lr' to try values of; did you mean learning_rate?",
        ),
        (["--variants=a:", "--sweep=seed:1,2"], "sweep: seed is the same for all trials"),
        (["--variants=a:", "--sweep=dataset:toy,none"], "sweep: dataset is the same for all trials"),
        (["--variants=a:; b: --compile=maybe"], "variant b: compile must be"),
        (["--variants=a:", "--sweep=block_size:32,1000000"], "not enough for block_size=1000000"),
        (["--variants=a:", "--lr_decay_iters=9"], "lr_decay_iters is not to be set here"),
        (
            ["--variants=a:", "--by=seconds", "--sweep=batch_size:2,64"],
            "batch_size may change: sweep rates",
        ),
        (["--variants=a:", "--sweep=learning_rate:1,b"], "sweep: learning_rate must be a finite number"),
        (["--variants=a:", "--sweep=learning_rate:1,1"], "a value of learning_rate is given twice"),
        (["--variants=a:", "--sweep=learning_rate:1e-3,-1"], "variant a: learning_rate must be above 0"),
        (
            ["--variants=a:", "--devices=cpu,cpu", "--by=seconds"],
            "by=seconds needs devices of one kind, and each once",
        ),
        (["--variants=a:", "--out_dir=data"], "data is there already: --overwrite moves it aside"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(lab, argv, message):
    with pytest.raises(Refusal) as refusal:
        call(compare, *SMALL, "--out_dir=out/refused", *argv, folder=lab)
    assert message in str(refusal.value) and refusal.value.status == 2
    assert not (lab / "out/refused").exists()


@pytest.mark.slow
def test_a_sweep_takes_texts_and_booleans_and_presets_keep_their_steps_out(lab):
    presets = lab / "presets"
    presets.mkdir()
    (presets / "long.toml").write_text("max_iters = 5000\nlearning_rate = 1e-2\n")
    argv = [
        "--variants=a: presets/long.toml",
        "--sweep=optimizer:adamw,muon bias:true,false",
        "--seeds=1",
    ]
    call(compare, *SMALL, *argv, "--out_dir=out/texts", folder=lab)
    [row] = results(lab / "out/texts")
    assert row["steps"] == 8 and row["values"]["optimizer"] in ("adamw", "muon")
    table = (lab / "out/texts/table.md").read_text()
    assert f"| a | {row['values']['optimizer']} | {row['values']['bias']} |" in table


def test_a_speed_that_cannot_be_measured_is_one_line(lab):
    argv = [
        "--variants=a: --grad_clip=0 --learning_rate=1e30 --warmup_iters=0",
        "--seeds=1",
        "--by=seconds",
    ]
    with pytest.raises(Refusal, match="a diverged while its speed was measured"):
        call(compare, *SMALL, *argv, "--budget=1", "--out_dir=out/fast", folder=lab)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(lab):
    argv = ["--variants=a:", "--seeds=1", "--out_dir=out/killed"]
    [job] = comparison(lab, *argv).runs()
    with contextlib.chdir(lab):
        job.folder.mkdir(parents=True)
        job.write(None)
        (job.folder / "ckpt_best.pt").write_bytes(b"of a run that is gone")
        (lab / "out/killed/table.md.123.tmp").write_text("half a table")
    call(compare, *SMALL, *argv, "--budget=9", folder=lab)
    [row] = results(lab / "out/killed")
    assert row["steps"] == 9


def test_a_comparison_whose_runs_all_diverged_has_no_legend(lab):
    argv = ["--variants=a: ; b: --optimizer=adamw", "--learning_rate=1e30", "--seeds=1"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No artists")  # which a legend of none is
        call(compare, *SMALL, *argv, "--out_dir=out/all-diverged", folder=lab)
    table = (lab / "out/all-diverged/table.md").read_text()
    assert "- b against a: no seed of which both runs ended; 2 runs diverged" in table
    assert (lab / "out/all-diverged/curves.png").exists()


def test_results_that_are_older_than_the_code_are_told(tmp_path, capsys):
    """As of a model.py that was changed since: no setting says so."""
    out = tmp_path / "out"
    for seed in 1, 2:
        path = out / f"runs/good-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    compare.warn_of_changes(out)
    assert capsys.readouterr().err == ""
    os.utime(path, (0, 0))
    compare.warn_of_changes(out)
    assert "1 of 2 runs" in capsys.readouterr().err


def test_a_comparison_in_use_is_not_moved_aside(lab, pair):
    with contextlib.chdir(lab), folders.alone(pair / "runs/good-1"):
        with pytest.raises(Refusal, match="is training in"):
            call(compare, *SMALL, PAIR, "--seeds=1,2,3", "--out_dir=out/pair$^$", "--overwrite")
    assert (pair / "results.jsonl").exists()


def test_another_comparison_in_the_folder_is_refused(lab, pair):
    argv = [*SMALL, PAIR, "--seeds=1,2,3", "--out_dir=out/pair$^$"]
    before = (pair / "results.jsonl").read_text()
    with pytest.raises(Refusal, match="has max_iters=8, not 9: --overwrite moves"):
        call(compare, *argv, "--budget=9", folder=lab)
    assert (pair / "results.jsonl").read_text() == before


@pytest.mark.slow
def test_a_log_or_a_result_that_is_lost_is_one_line_and_its_run_can_start_anew(lab):
    argv = [*SMALL, "--variants=a:", "--seeds=1,2", "--out_dir=out/lost"]
    call(compare, *argv, folder=lab)
    before = results(lab / "out/lost")
    run = lab / "out/lost/runs/a-1"
    result = run.with_name("a-1.json")
    (run / "log.jsonl").write_text("")
    (lab / "out/lost/curves.png").unlink()
    call(compare, *argv, folder=lab)
    assert (lab / "out/lost/curves.png").exists()
    result.write_text(result.read_text()[:100])
    with pytest.raises(Refusal, match=r"a-1.json is damaged .* starts anew") as refusal:
        call(compare, *argv, folder=lab)
    assert refusal.value.status == 1
    result.unlink()
    with pytest.raises(
        Refusal, match="a-1/log.jsonl is damaged: .* without out/lost/runs/a-1 "
    ) as refusal:
        call(compare, *argv, folder=lab)
    assert refusal.value.status == 1
    shutil.rmtree(run)
    call(compare, *argv, folder=lab)
    assert results(lab / "out/lost") == before
