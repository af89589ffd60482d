"""A plan in words: a row for each figure, with its basis; the models behind them; and what it comes to."""

from collections.abc import Iterator

from pcl_fast.profile.plan.allreduce import BFLOAT16, HOP_BETWEEN, HOP_INSIDE, LINK_REACHED, exchange_of
from pcl_fast.profile.plan.basis import Basis, Row, amount, duration, told
from pcl_fast.profile.plan.epoch import ALLREDUCE_WANTED, Plan
from pcl_fast.profile.plan.memory import activation_bytes, weight_bytes

GIVEN = "flags and preset"
MODEL = "the models below"


def rows_of(plan: Plan) -> Iterator[Row]:
    """Every figure of a plan."""
    yield from _run(plan)
    yield from _step(plan)
    yield from _host(plan)
    yield from _time(plan)
    yield from _memory(plan)
    yield from _network(plan)


def models_of(plan: Plan) -> Iterator[str]:
    """What is assumed, a line each."""
    yield (
        "all-reduce: a ring of n ranks, 2 (n - 1) / n of the bytes at the bandwidth of the slowest link, and "
        f"2 (n - 1) hops of {1e6 * HOP_INSIDE:g} us inside a node ({1e6 * HOP_BETWEEN:g} us with several "
        f"nodes); {LINK_REACHED:.0%} of a link is reached; it follows the backward pass and overlaps with "
        "nothing. All of it is assumed."
    )
    yield (
        "a step: as long as computing and all-reduce together, or as the hosts take to prepare its images; a "
        "core for each GPU drives it, all others prepare images."
    )
    yield (
        "evaluation: each rank has its part of the images, and reaches the share of the floor that a "
        "training step does. Start, compilation, warm-up and checkpoints are left out."
    )
    if plan.config.sync_bn:
        yield "--sync-bn: its norms do without our kernels; what they lose by that is not counted."
    if plan.pace:
        yield (
            "progressive resizing: an epoch of smaller views computes as much less as the floor of its "
            "step is lower; loading is taken to stay as slow."
        )


def sentence(plan: Plan, name: str) -> str:
    """What it comes to."""
    cluster, train = plan.cluster, plan.config.train
    where = f"{cluster.ranks} {cluster.gpu.name.upper()}{'s' * (cluster.ranks > 1)}"
    nodes = f" in {cluster.nodes} nodes" if cluster.nodes > 1 else ""
    epoch = duration(sum(plan.seconds_of_epochs) / train.epochs)
    binds = f"{plan.binds} {'bind' if plan.binds == 'data' else 'binds'}"
    return (
        f"{name} on {where}{nodes}: {binds}; expect {epoch} an epoch and {duration(plan.run_seconds)} "
        f"for all {train.epochs}, evaluation included ({_how(plan)})."
    )


def _how(plan: Plan) -> str:
    feed = plan.feed is not None and plan.feed.basis.kind == "measured"
    parts = {"a step": plan.step.basis.kind == "measured", "loaders": feed}
    measured = " and ".join(part for part, known in parts.items() if known)
    return f"projected from {measured} as measured" if measured else "projected"


def _run(plan: Plan) -> Iterator[Row]:
    config, cluster = plan.config, plan.cluster
    given = Basis("given", GIVEN)
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus} {cluster.gpu.name.upper()}"
    yield Row("run", "ranks", f"{cluster.ranks}: {nodes}, {cluster.cores} cores", given)
    views = f"{plan.work.num_views} view{'s' * (plan.work.num_views > 1)}"
    batch = f"{config.train.batch_size:,} images a rank, {plan.global_batch:,} in all, {views} of each"
    yield Row("run", "batch", batch, given)
    steps = f"{plan.steps_per_epoch:,} an epoch, {plan.steps_per_epoch * config.train.epochs:,} in all"
    of = f"{plan.images.train:,} images over the batch"
    yield Row("run", "steps", steps, Basis("computed", of))
    warmup = config.optim.warmup_epochs
    when = f"after {warmup:g} epochs of warm-up" if warmup else "at the start"
    yield Row("run", "learning rate", f"{config.initial_lr:g} {when}", Basis("computed", _scaling(plan)))


def _scaling(plan: Plan) -> str:
    config = plan.config
    if config.optim.lr_batch is not None:
        return f"{config.optim.lr:g} is for {config.optim.lr_batch:,} images, in proportion"
    scaled = config.optim.lr * plan.cluster.ranks
    more = f"; --optim.lr-batch {config.train.batch_size} would make it {scaled:g}"
    return "as given, not scaled to the batch" + more * (plan.cluster.ranks > 1)


def _step(plan: Plan) -> Iterator[Row]:
    batch, model = plan.config.train.batch_size, Basis("projected", MODEL)
    rate = f"{duration(plan.step.seconds)}, {told(batch / plan.step.seconds)} images/s a GPU"
    yield Row("step", "computing", rate, plan.step.basis)
    moved = exchange_of(plan.work, plan.config)
    width = "bfloat16" if plan.config.dist.reduce_dtype == "bfloat16" else "float32"
    parts = (
        f"{amount(moved.gradients)} of gradients ({width}), {amount(moved.statistics)} of running statistics"
    )
    if moved.synchronised:
        parts += f", {amount(moved.synchronised)} for --sync-bn"
    counted = f"the network's weights and norms; {moved.messages:,} messages"
    yield Row("step", "added up", parts, Basis("computed", counted))
    share = f"{duration(plan.allreduce)}, {plan.allreduce / plan.on_gpus:.1%} of what GPUs do"
    slowest = f"{told(plan.cluster.bandwidth / 1e9)} GB/s, {MODEL}"
    yield Row("step", "all-reduce", share, Basis("projected", slowest))
    if plan.feed is not None:
        yield Row("step", "loading", f"{duration(plan.loading)}, beside it", _loading_basis(plan))
    yield Row("step", "in all", f"{duration(plan.step_seconds)}: {plan.binds}", model)


def _loading_basis(plan: Plan) -> Basis:
    return Basis("projected", f"{plan.feeding_cores} cores a node at the rate below")


def _host(plan: Plan) -> Iterator[Row]:
    feed, cluster = plan.feed, plan.cluster
    if feed is None or plan.fed is None:
        nothing = "the data lie in the GPU's memory" if plan.config.data.backend == "resident" else "noise"
        yield Row(
            "host",
            "loading",
            f"none: {nothing}",
            Basis("given", f"--data.backend {plan.config.data.backend}"),
        )
        return
    yield Row("host", "a core prepares", f"{told(feed.rate)} images/s", feed.basis)
    fed, wanted = plan.fed / cluster.nodes, plan.global_batch / plan.on_gpus / cluster.nodes
    on = f"{plan.feeding_cores} of {cluster.cores} cores, times the rate of one"
    yield Row("host", "a node can feed", f"{told(fed)} images/s", Basis("projected", on))
    yield Row(
        "host",
        "its GPUs can take",
        f"{told(wanted)} images/s",
        Basis("projected", "computing and all-reduce"),
    )
    left = cluster.cores - plan.cores_needed
    spare = f"{left} to spare" if left >= 0 else f"{-left} too few"
    driving = f"{cluster.gpus} of them drive the GPUs"
    yield Row("host", "cores needed", f"{plan.cores_needed} a node: {spare}", Basis("projected", driving))


def _time(plan: Plan) -> Iterator[Row]:
    model, epochs = Basis("projected", MODEL), plan.config.train.epochs
    each = plan.images_per_second / plan.cluster.ranks
    rate = f"{told(each)} images/s a GPU, {told(plan.images_per_second)} in all"
    yield Row("time", "speed", rate, Basis("projected", "batch over step"))
    epoch = duration(plan.epoch_seconds)
    if plan.pace:
        epoch += f" with full views, the first {duration(plan.seconds_of_epochs[0])}"
    yield Row("time", "epoch", epoch, Basis("projected", f"{plan.steps_per_epoch:,} steps"))
    evaluation = f"{duration(plan.evaluation_seconds)}, {plan.evaluations} times"
    yield Row("time", "evaluation", f"{evaluation}, {plan.images.val:,} images", model)
    yield Row(
        "time", "run", f"{duration(plan.run_seconds)}", Basis("projected", f"{epochs} epochs and evaluations")
    )


def _memory(plan: Plan) -> Iterator[Row]:
    gpu, config = plan.cluster.gpu, plan.config
    travelling = BFLOAT16 if config.dist.reduce_dtype == "bfloat16" else 0
    weights, kept = weight_bytes(plan.work, travelling), activation_bytes(plan.work)
    counted = "weights, gradients, momentum, averages, copies"
    yield Row("memory", "of weights", amount(weights), Basis("computed", counted))
    if plan.step.memory is not None:
        yield Row("memory", "of a step", _fits(plan, plan.step.memory), plan.step.basis)
    else:
        least = Basis("projected", "a least: the kernels' results; libraries' workspaces come on top")
        yield Row("memory", "of activations", amount(kept), least)
        yield Row(
            "memory",
            "of a GPU",
            _fits(plan, weights + kept),
            Basis("projected", f"at least, on one {gpu.name}"),
        )
    stored = plan.images.stored
    if stored is None or plan.images.stored_basis is None:
        return
    size, rate = stored * plan.images.train, plan.images_per_second / plan.cluster.nodes
    yield Row("memory", "training file", amount(size), plan.images.stored_basis)
    advice = f"{amount(size)} a node to keep the file; else disks read {amount(stored * rate)}/s"
    once = "the file's size and a node's images/s; --data.order pages reads it once an epoch"
    yield Row("memory", "page cache", advice, Basis("projected", once))


def _fits(plan: Plan, taken: float) -> str:
    whole = plan.cluster.gpu.memory
    if taken > whole:
        return f"{amount(taken)} of {amount(whole)}: too much, halve --train.batch-size"
    return f"{amount(taken)} of {amount(whole)}"


def _network(plan: Plan) -> Iterator[Row]:
    cluster = plan.cluster
    if cluster.nodes == 1:
        yield Row("network", "between nodes", "none needed", Basis("given", "one node"))
        return
    each, node = cluster.network / 1e9, cluster.gpus * cluster.network / 1e9
    given = f"{told(each)} GB/s for each GPU, {told(node)} GB/s a node"
    yield Row("network", "between nodes", given, Basis("given", "--network, each way"))
    needed = f"{told(plan.network_needed / 1e9)} GB/s for each GPU"
    wanted = Basis("projected", f"moving then takes {ALLREDUCE_WANTED:.0%} of computing; hops come on top")
    yield Row("network", "needed", needed, wanted)
