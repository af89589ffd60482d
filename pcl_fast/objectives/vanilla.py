"""The network trained alone: what every method is measured against."""

from torch import Tensor

from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives.base import Deployment, Objective, peer_cross_entropies


class Vanilla(Objective):
    """Cross-entropy of one network on one view."""

    num_peers = 1
    num_views = 1
    has_ensemble = False
    uses_mean_teacher = False
    ramps_up = False
    deployment = Deployment("student")
    headline = {"vanilla": "peer1"}  # noqa: RUF012
    term_names = ("ce/peer1",)

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """CE(z, y): [1]."""
        return peer_cross_entropies(student.logits_VBC, labels_B)
