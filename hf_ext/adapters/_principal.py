"""The principal-component family: adapters that train the leading singular directions of the base weight.

Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, eq. 2-5. With W0 the base weight, U (out_features, r) its
leading left singular vectors and C = U^T W0, the layer computes (W0 - U C) x + f(x), where f starts as U C.

Differs from the paper and from PEFT's PiSSA:
- The base weight is not written by default (see `_offset`); `base_mode="residual"` is the paper's form.
- U and C travel with the checkpoint, so that loading never repeats a decomposition, which is not reproducible
  across machines. `save_basis=False` leaves them out, repeats it and checks the outcome.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import dist
from ..core.checks import check
from ..core.lowrank import TruncatedSVD, truncated_svd
from ._offset import OffsetConfig, OffsetLinear
from ._recomputed import RecomputedLinear, RecomputedModel, bilinear_form

FINGERPRINT_TOLERANCE = (
    1e-3  # relative; another machine's decomposition differs by rounding, another base by more
)


@dataclass
class PrincipalConfig(OffsetConfig):
    """Settings of the principal-component family, beside those of its base (`OffsetConfig`).

    The start does not depend on alpha.

    Args:
        n_iter: Krylov steps of the decomposition after the first, >= 0; more, closer to the exact SVD.
        oversample: Directions that it seeks beyond r, >= 0; None for max(16, r // 4).
        save_basis: Whether checkpoints hold the frozen U and C (as large as the adapter itself). Without them
            loading decomposes the base again, and compares one number of each module with the original's.
    """

    n_iter: int = 9
    oversample: int | None = None
    save_basis: bool = True

    def validate(self) -> None:
        """Check the family's fields."""
        super().validate()
        check(self.n_iter >= 0, "n_iter", self.n_iter, "at least 0")
        check(
            self.oversample is None or self.oversample >= 0,
            "oversample",
            self.oversample,
            "None or at least 0",
        )


class PrincipalLinear(RecomputedLinear, OffsetLinear):
    """Linear layer whose leading singular directions are replaced by trained factors.

    A method says how its factors start from a decomposition (`start`).
    """

    kept_by = "save_basis"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.recomputed_names = getattr(cls, "offset_names", ())  # a method names them

    @abstractmethod
    def start(self, svd: TruncatedSVD, scale: float) -> dict[str, Tensor]:
        """Return the trained tensors with scale * (their product) = u diag(s) vh."""

    def initial_values(self, r: int, config: Any, weight: Tensor | None) -> dict[str, Tensor]:
        """Return the trained tensors and the basis from the leading r triplets of the base weight."""
        assert weight is not None
        svd = truncated_svd(
            self.layout.trainable(
                self.original(weight)
            ),  # a second adapter starts from W0 as the first one did
            r,
            oversample=config.oversample,
            n_iter=config.n_iter,
            seed=config.seed,
            name=self.module_name,
        )
        u, c = self.offset_names
        values = self.start(svd, config.scale_of(self.module_name))
        # u^T W0 = diag(s) vh whatever the quality of the decomposition: the start cancels to rounding.
        return {**values, u: svd.u, c: svd.s[:, None] * svd.vh}

    def marks(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the fingerprint of U C."""
        return {"fingerprint": fingerprint(*(self.plain(key, tensors[key]) for key in self.offset_names))}

    def recall(self, name: str, marks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return U and C as injection has computed them.

        Raises:
            ValueError: Their product is not the checkpoint's.
        """
        u, c = (self.plain(key, dist.full_tensor(getattr(self, key)[name])) for key in self.offset_names)
        found, wanted = float(fingerprint(u, c)), float(marks["fingerprint"])
        # Relative to the size of U C: the form itself can come out near zero.
        check(
            abs(found - wanted) <= FINGERPRINT_TOLERANCE * float(c.detach().norm()),
            "fingerprint",
            found,
            f"{wanted!r}, as in the checkpoint: this is not the base model the adapter was made for",
            where=self.module_name,
        )
        return self.recomputed(name)


class PrincipalModel(RecomputedModel):
    """Tuner of the principal-component family."""


def fingerprint(u: Tensor, c: Tensor) -> Tensor:
    """Return a fixed random form of U C, fp64, (1,); no sign or rotation of the basis changes it."""
    return bilinear_form(u, c).reshape(1)
