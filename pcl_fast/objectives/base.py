"""The contract of an objective: one training method over the multi-branch network."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.contract import MakeHead, PeerOutputs


@dataclass(frozen=True, slots=True)
class Deployment:
    """Which of a method's networks is the product: the student's or the mean teacher's, and which peer."""

    network: Literal["student", "mean_teacher"]
    peer: int = 0


@dataclass(frozen=True, slots=True)
class Loss:
    """A batch's loss, ready to be differentiated: the sum of `roots`, each times its seed (None: 1).

    `terms` float32 [terms], detached; `correct` int64 [peers (+ ensemble)], right top-1 answers.
    """

    terms: Tensor
    correct: Tensor
    roots: tuple[Tensor, ...]
    seeds: tuple[Tensor | None, ...]


class Objective(ABC):
    """What a method asks of the network, of the data and of the step, and its loss.

    `headline` maps the names a method's results are reported under to evaluated heads
    (`peer1`..., `ensemble`, `mean_teacher1`..., `mean_ensemble`). One that `uses_trained_teacher` gets its
    outputs in the place of the mean teachers'; `ramps_up` says whether it reads w(e). Unless it
    `shares_trunk`, each peer is a whole network; what peers send back into the trunk is multiplied with
    `split_gradient`. The ensemble is a linear classifier over all features, or what `make_head` makes, with
    `head_weight_decay` if that is given.

    `memory` are tensors that `terms` reads and that no gradient changes: a run keeps them on its device, and
    saves them. One that `wants_held_out` writes into them, in place, after every epoch what it concludes from
    observing images held out of training (`--data.hold-out`).
    """

    num_peers: int
    num_views: int
    has_ensemble: bool
    uses_mean_teacher: bool
    deployment: Deployment
    headline: dict[str, str]
    term_names: tuple[str, ...]
    ramps_up: bool = True
    uses_trained_teacher: bool = False
    shares_trunk: bool = True
    split_gradient: float = 1.0
    make_head: MakeHead | None = None
    head_weight_decay: float | None = None
    wants_held_out: bool = False
    memory: Mapping[str, Tensor] = MappingProxyType({})

    @abstractmethod
    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """The loss, term by term in the order of `term_names`, weighted: their sum is the loss.

        `labels_B` are int64 [B], or soft: floats [B, C], rows that sum to 1 (mixup, label smoothing), which
        `F.cross_entropy` takes alike. `weight` is the distillation weight w(e); `teacher` holds the mean
        teachers' outputs. Returns float32 [terms] (float64 if the logits are).
        """

    def loss(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: Tensor
    ) -> Loss:
        """The same with right answers counted, and from where to differentiate.

        A method with a kernel that makes losses and their gradients at once overrides this.
        """
        terms = self.terms(student, teacher, labels_B, weight)
        return Loss(terms.detach(), count_correct(student, labels_B), (terms.sum(),), (None,))

    def move_memory(self, device: torch.device) -> None:
        """Put what is remembered where training runs, before a step is captured."""
        self.memory = {name: tensor.to(device) for name, tensor in self.memory.items()}

    def observe(self, student: PeerOutputs, labels_B: Tensor) -> Tensor:
        """What to add up over all held-out images, of a batch of them; always of one shape, float64.

        The student is in eval mode, and sees each image as one view, un-augmented.
        """
        raise NotImplementedError(f"{type(self).__name__} wants held-out images: it must observe them")

    def conclude(self, sums: Tensor, images: int) -> None:
        """Write into `memory` what the sums over so many images say; on every rank, from sums over all."""
        raise NotImplementedError(f"{type(self).__name__} wants held-out images: it must conclude from them")


def of_each(kind: str, num_peers: int) -> tuple[str, ...]:
    """The names of a kind of term, one for each peer: `ce/peer1`, ..."""
    return tuple(f"{kind}/peer{j + 1}" for j in range(num_peers))


def full_precision(logits: Tensor) -> Tensor:
    """Logits in float32 at least: softmaxes and losses are never computed in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def peer_cross_entropies(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """CE(z_j, y), averaged over the batch, for every peer: [V]; with soft labels, -sum_c y_c log p_c."""
    peers, batch, classes = logits_VBC.shape
    flat = full_precision(logits_VBC).reshape(peers * batch, classes)
    of_each_peer = labels_B.repeat(peers, *(1,) * (labels_B.dim() - 1))
    losses = F.cross_entropy(flat, of_each_peer, reduction="none")
    return losses.view(peers, batch).mean(1)


@torch.no_grad()
def count_correct(outputs: PeerOutputs, labels_B: Tensor) -> Tensor:
    """Right top-1 answers of every peer, then of the ensemble if there is one: int64 [peers (+ 1)].

    Of a soft label the class with the largest weight is right.
    """
    answers = outputs.logits_VBC.argmax(-1)
    if outputs.ensemble_logits_BC is not None:
        answers = torch.cat([answers, outputs.ensemble_logits_BC.argmax(-1)[None]])
    right_B = labels_B.argmax(-1) if is_soft(labels_B) else labels_B
    return (answers == right_B).sum(-1)


def label_logits(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """<y, z>: the logits of the labels, by weight if those are soft: [V, B]. CE = logsumexp z - <y, z>."""
    if is_soft(labels_B):
        return (logits_VBC * labels_B).sum(-1)
    return logits_VBC.gather(-1, labels_B[None, :, None].expand(len(logits_VBC), -1, 1))[..., 0]


def class_weights(like_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """Labels as weights of all classes, [B, C], of the type of `like_VBC`."""
    if is_soft(labels_B):
        return labels_B.to(like_VBC.dtype)
    return torch.zeros_like(like_VBC[0]).scatter_(1, labels_B[:, None], 1.0)


def is_soft(labels_B: Tensor) -> bool:
    """Whether labels are weights of all classes, [B, C], not classes, [B]."""
    return labels_B.is_floating_point()
