"""VR-PGE: which units a net keeps, learned from losses alone, and steps that compute only those.

``maths`` holds the projection and the policy gradient, ``draws`` the random numbers, ``groups``
says which parameters one gate covers, ``gate`` is the mask, ``method`` the life of a training and
``options`` what it takes; ``step`` is the weight step on the drawn sub-net alone: ``cuts`` gathers
its tensors, ``sizes`` rounds its channels, ``trial`` finds those that can't be left out.
"""

from sparsefx.sparsifiers.vrpge.maths import policy_gradient, project
from sparsefx.sparsifiers.vrpge.method import VRPGE
from sparsefx.sparsifiers.vrpge.options import Choice
from sparsefx.sparsifiers.vrpge.step import CompactStep, Macs

__all__ = ["VRPGE", "Choice", "CompactStep", "Macs", "policy_gradient", "project"]
