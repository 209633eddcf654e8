"""Gradients of several processes, which are added up while the backward pass still computes other gradients.

For the backward pass of the last micro-batch:

    with GradientSum(model, params, compute, loss) as gradients:
        micro_loss.backward()
    loss = gradients.finish()
"""

import torch

BUCKET = 1 << 20  # numbers in a message, 4 MiB: of gradients that are ready at about the same time
IN_FLIGHT = 4  # messages at a time: each process holds so many buckets of every process


class GradientSum:
    """Sums the gradients of a model's params, and a loss, over all processes, in messages of about BUCKET
    numbers.

    A message leaves when the last of its gradients is ready; all processes send messages in the same order.
    A gradient that a process does not have, as that of an expert without tokens, counts as zeros. Over gloo
    each process gets all parts and adds them in the order of the ranks, so that k processes have to the bit
    what k micro-batches add up to; a ring would add each part of a message in another order. This is k / 2
    times a ring's traffic.
    """

    def __init__(self, model, params, compute, loss):
        self.compute = compute
        self.loss = loss
        self.buckets = []
        size = BUCKET
        places = {p: i for i, p in enumerate(model.parameters())}
        for p in sorted(params, key=places.get, reverse=True):  # about the order of the backward pass
            if size >= BUCKET:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.numel()
        self.numbers = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients that are not ready
        self.n_sent = 0
        self.in_flight = []  # (parameters, the parts of all processes, work)

    def __enter__(self):
        self.hooks = [p.register_post_accumulate_grad_hook(self.note) for p in self.numbers]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def note(self, p):
        """Counts a gradient that is complete, and sends what can leave."""
        self.missing[self.numbers[p]] -= 1
        while self.n_sent < len(self.buckets) and self.missing[self.n_sent] == 0:
            self.send()

    def send(self):
        """Sends the next bucket's gradients, and with the first one the loss."""
        params = self.buckets[self.n_sent]
        tensors = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        if self.n_sent == 0:
            tensors.append(self.loss.to(params[0].dtype))
        message = torch.cat([x.flatten() for x in tensors])
        if message.is_cpu:
            parts = [torch.empty_like(message) for _ in range(self.compute.world_size)]
            work = torch.distributed.all_gather(parts, message, async_op=True)
        else:
            parts = [message]
            work = torch.distributed.all_reduce(message, async_op=True)
        if len(self.in_flight) == IN_FLIGHT:
            self.receive()
        self.in_flight.append((params, parts, work))
        self.n_sent += 1

    def receive(self):
        """Waits for the oldest message, and puts the sums into its parameters' gradients."""
        params, parts, work = self.in_flight.pop(0)
        work.wait()
        total, *others = parts
        for part in others:
            total += part
        sizes = [p.numel() for p in params]
        if params is self.buckets[0]:
            # a copy, as a view would keep the whole message until the log reads the loss
            self.loss = total[-1].clone()
            total = total[:-1]
        for p, grad in zip(params, total.split(sizes)):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(grad.view_as(p))

    def finish(self):
        """Returns the loss of all processes, when the gradients, too, are summed."""
        while self.n_sent < len(self.buckets):
            self.send()
        while self.in_flight:
            self.receive()
        return self.loss
