"""What becomes of DALI's outputs: the views of each batch, in memory of their own."""

import re
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcl_fast.errors import DataError
from pipelines import views_cpu
from pipelines.augment import make_views
from pipelines.boxes import Boxes
from pipelines.dali_feed import Fed, Feed
from pipelines.dali_pipeline import AHEAD, Plan, build, inputs, padded_size
from pipelines.images import ImageSource, decode
from pipelines.recycled import Recycler
from pipelines.view_spec import COLOURS, ViewSpec

# Of int64 sizes [B, 2] and sample ids [B].
BoxRule = Callable[[NDArray[np.int64], NDArray[np.int64]], Boxes[NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Made:
    """A batch of views; `ready` when the device has made them."""

    ids_B: Tensor
    labels_B: Tensor
    views_VBCSS: Tensor
    ready: Any = None

    def receive(self) -> "Made":
        """Have the caller's stream wait for the views, and keep their memory until it has used them."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.views_VBCSS.device)
            stream.wait_event(self.ready)
            for tensor in (self.ids_B, self.labels_B, self.views_VBCSS):
                tensor.record_stream(stream)
        return self


@dataclass(frozen=True, slots=True)
class _Batch:
    ids_B: NDArray[np.int64]
    fed: Fed
    boxes: Boxes[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Work:
    """Where images come from, what DALI does with them, and what the views are like."""

    source: ImageSource
    plan: Plan
    spec: ViewSpec
    device: torch.device
    memory: Recycler

    def resized(self, size: int) -> "Work":
        """The same for views of `size` x `size` pixels."""
        spec = replace(self.spec, size=size)
        plan = replace(self.plan, crops=spec if self.plan.crops is not None else None)
        return replace(self, spec=spec, plan=plan)

    def empty(self, views: int, batch: int) -> Tensor:
        """Memory for the views of a batch."""
        if self.device.type == "cuda":
            return self.spec.empty(views, batch, self.device)
        like = self.spec.empty(views, batch, torch.device("meta"))
        memory = self.memory.empty(like.numel() * like.element_size())
        return memory.view(like.dtype).as_strided(like.shape, like.stride())

    def run(self, batches: Sequence[Tensor], boxes: BoxRule) -> Generator[Made]:
        """Make the batches of these samples; DALI's threads and ours end with the generator.

        Raises:
            DataError: naming the sample that is damaged.
        """
        if not batches:
            return
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with ThreadPoolExecutor(self.plan.threads, "pcl_fast views") as pool:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                run = _Run(self, batches, boxes, pool)
            try:
                for _ in batches:
                    with torch.cuda.stream(stream) if stream is not None else nullcontext():
                        made = run.next(stream)
                    yield made
            finally:
                run.close()


class _Run:
    """A pipeline on its way through some batches."""

    def __init__(self, work: Work, batches: Sequence[Tensor], boxes: BoxRule, pool: Executor) -> None:
        self.work, self.boxes, self.pool = work, boxes, pool
        self.feed = Feed(work.source, pool, work.plan.threads)
        self.to_feed = iter(batches)
        self.waiting: deque[_Batch] = deque()
        # DALI reads where the bytes are: they stay until the batch after has come out, too.
        self.held: deque[_Batch] = deque(maxlen=AHEAD + 3)
        self.pipeline = build(work.plan, self._feed)

    def close(self) -> None:
        """End DALI's threads; they would end when the pipeline is collected, which a traceback delays."""
        self.pipeline._shutdown()

    def next(self, stream: torch.cuda.Stream | None) -> Made:
        """The next batch, made on `stream`."""
        try:
            self.pipeline.schedule_run()
            outputs = self.pipeline.outputs(stream)
        except RuntimeError as error:
            raise self._explain(str(error)) from None
        batch = self.waiting.popleft()
        self._check_sizes(batch, outputs)
        views_VBCSS = self._views(batch, outputs)
        ids_B, labels_B = (
            torch.from_numpy(numbers).to(self.work.device, non_blocking=True)
            for numbers in (batch.ids_B, self.work.source.labels_N[batch.ids_B])
        )
        return Made(ids_B, labels_B, views_VBCSS, stream.record_event() if stream is not None else None)

    def _feed(self) -> tuple[Any, ...]:
        ids_B = next(self.to_feed).numpy()
        fed = self.feed.read(ids_B)
        batch = _Batch(ids_B, fed, self.boxes(fed.sizes_B2, ids_B))
        self.waiting.append(batch)
        self.held.append(batch)
        return inputs(self.work.plan, fed, batch.boxes)

    def _check_sizes(self, batch: _Batch, outputs: Sequence[Any]) -> None:
        """Boxes are drawn for the sizes that headers tell: views of other images would be of other memory."""
        decoded = outputs[0 if self.work.plan.crops is None else -1]
        sizes_B2 = np.array([shape[:2] for shape in decoded.shape()])
        wrong_B = (sizes_B2 != batch.fed.sizes_B2).any(1)
        if wrong_B.any():
            place = int(wrong_B.argmax())
            found, told = (tuple(map(int, sizes[place])) for sizes in (sizes_B2, batch.fed.sizes_B2))
            why = f"DALI finds {found} pixels, its header tells {told}"
            raise self.work.source.damaged(int(batch.ids_B[place]), why)

    def _views(self, batch: _Batch, outputs: Sequence[Any]) -> Tensor:
        work, views = self.work, batch.boxes.flip_VB.shape[0]
        out = work.empty(views, len(batch.ids_B))
        if work.plan.crops is not None:
            for made_BCSS, view in zip(out, outputs, strict=False):
                made_BCSS.copy_(torch.from_dlpack(view.as_tensor()).permute(0, 3, 1, 2))
        elif work.plan.padded:
            self._views_on_the_device(batch, outputs, out)
        else:
            boxes = _on(work.device, batch.boxes)
            self._views_where_decoded(views_cpu.Job(boxes, work.spec, out, boxes.colours_VB5), outputs[0])
        return out

    def _views_on_the_device(self, batch: _Batch, outputs: Sequence[Any], out: Tensor) -> None:
        """Of all images at once; one by one if padding them to one size took too much memory."""
        boxes, spec = _on(self.work.device, batch.boxes), self.work.spec
        if padded_size(batch.fed.sizes_B2) is not None:
            make_views(torch.from_dlpack(outputs[1].as_tensor()), boxes, spec, boxes.colours_VB5, out)
            return
        for place in range(len(batch.ids_B)):
            image_BHWC = torch.from_dlpack(outputs[0][place]).unsqueeze(0)
            one = _one(boxes, place)
            out[:, place] = make_views(image_BHWC, one, spec, one.colours_VB5)[:, 0]

    def _views_where_decoded(self, job: views_cpu.Job, decoded: Any) -> None:
        """By C++ in as many threads as decode, from DALI's memory."""
        make, threads = views_cpu.image_function(), self.work.plan.threads

        def make_part(first: int) -> None:
            for place in range(first, len(decoded), threads):
                image = decoded[place]
                make(job.address, image.data_ptr(), image.shape()[1] * COLOURS, place)

        list(self.pool.map(make_part, range(threads)))

    def _explain(self, error: str) -> DataError:
        """Which sample it was, by PIL: DALI names its place in the batch only, and not always."""
        source = self.work.source
        named = [int(place) for place in re.findall(r"sample #(\d+)", error)]
        ids = [
            int(batch.ids_B[place]) for batch in self.waiting for place in named if place < len(batch.ids_B)
        ]
        ids += [sample for batch in self.waiting for sample in batch.ids_B.tolist()]
        for sample in ids:
            try:
                decode(source, sample)
            except DataError as found:
                return found
        lines = [line.strip() for line in error.splitlines() if line.strip()]
        reason = lines[-3] if len(lines) > 2 else error
        return DataError(
            f"{source.path}: DALI cannot decode one of the samples {', '.join(map(str, ids))} ({reason}), "
            "though PIL can; --data.backend torch reads it"
        )


def _on(device: torch.device, boxes: Boxes[NDArray[Any]]) -> Boxes[Tensor]:
    def moved(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    perhaps = (None if drawn is None else moved(drawn) for drawn in (boxes.grids_VB4, boxes.colours_VB5))
    return Boxes(moved(boxes.boxes_VB4), moved(boxes.flip_VB), *perhaps)


def _one(boxes: Boxes[Tensor], place: int) -> Boxes[Tensor]:
    """Those of one image."""
    only = slice(place, place + 1)
    perhaps = (None if drawn is None else drawn[:, only] for drawn in (boxes.grids_VB4, boxes.colours_VB5))
    return Boxes(boxes.boxes_VB4[:, only], boxes.flip_VB[:, only], *perhaps)
