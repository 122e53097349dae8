"""The `objective` section: one class per method, chosen by `objective.kind`. Known traps among settings are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from quatro_ray.config.base import Section
from quatro_ray.config.paths import FunctionPath

Level = Literal["token", "sequence", "geometric"]


class ImportanceConfig(Section):
    """Importance weights that correct for the drift of the policy since sampling: w = min(ρ, truncation), detached."""

    level: Level = "token"
    """Level of the ratio ρ. token: of each token. sequence: the product over the response. geometric: its
    length-normalised root."""
    truncation: float = Field(2.0, ge=1)
    """Upper bound of a weight; a bound below 1 would shrink on-policy samples. Lower it if gradients are noisy."""


_SPLIT = "set tilt_share for how far one group may tilt the policy, max_token_shift for how far a token may move"
_MASK = "max_token_shift stops tokens that have moved too far, at any length and staleness"
_REMOVED = {
    "kl_budget_nats": _SPLIT,
    "kl_budget_unit": _SPLIT,
    "headroom_exponent": "tilt_share gives hard queries more room by itself",
    "shrink_by_ess": _MASK,
    "max_eta": "tilt_share bounds every target, on any scale of rewards",
    "eta_cap": "tilt_share bounds every target, on any scale of rewards",
    "stabilizer": _MASK,
    "drift_nats_per_token": _MASK,
    "staleness_exponent": f"{_MASK}; learner.step_control.window_kl_nats_per_token gives old samples shorter steps",
}


class QuatroConfig(Section):
    """Exact per-query trust region around the policy that sampled. arXiv 2602.04620; docs/algorithm.md."""

    removed: ClassVar = {name: f"{successor} (docs/algorithm.md)" for name, successor in _REMOVED.items()}

    kind: Literal["quatro"]
    tilt_share: float = Field(0.3, gt=0, lt=1)
    """κ: the targets of a query have a KL of κ log(G/k) nats a response, k of its G rollouts having the best reward.
    log(G/k) is the most that a group allows. Lower it to keep more entropy."""
    max_token_shift: float = Field(0.15, gt=0, le=1)
    """δ: a token whose probability has moved by more than this since it was sampled is not pushed further. Lower it to
    stop tokens earlier. 1: none is stopped."""
    importance: ImportanceConfig = ImportanceConfig()
    """Weights π_θ/β of the per-token losses."""


class _DualClip(Section):
    dual_clip: float | None = Field(None, gt=1)
    """Ratio beyond which a token with a negative advantage has no gradient; without it, one such token can own the
    whole gradient. verl sets 3. null: none, as in the method's paper."""


class _Clipped(_DualClip):
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Distance of the clip range's lower end from 1: ratios below 1 − clip_low are clipped."""
    clip_high: float = Field(0.2, gt=0)
    """Distance of the clip range's upper end from 1: ratios above 1 + clip_high are clipped."""


class GrpoConfig(_Clipped):
    """Group-normalised advantage with clipped ratios. arXiv 2402.03300, eq. 3."""

    kind: Literal["grpo"]


class DrGrpoConfig(_Clipped):
    """GRPO without its two biases: no division by the group's std, none by response length. arXiv 2503.20783."""

    kind: Literal["dr_grpo"]


class DapoConfig(_Clipped):
    """Clip-higher and token mean. arXiv 2503.14476, eq. 8. Its filter and length reward are in filters and rewards."""

    kind: Literal["dapo"]
    clip_high: float = Field(0.28, gt=0)
    """Distance of the clip range's upper end from 1; above clip_low, so that rare tokens can grow."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if the clip range is not wider above 1 than below, which is DAPO's clip-higher."""
        if self.clip_high <= self.clip_low:
            yield (
                f"clip_high={self.clip_high:g} must exceed clip_low={self.clip_low:g}, which is DAPO's clip-higher: "
                "raise it (0.28 in the paper) or use kind: grpo"
            )


class GspoConfig(Section):
    """Clips the length-normalised ratio of whole responses. arXiv 2507.18071, eq. 5."""

    kind: Literal["gspo"]
    clip_low: float = Field(3e-4, gt=0, lt=0.2)
    """Distance of the clip range's lower end from 1. The ratio is a mean over the response, so the range of single
    tokens (0.2) would hardly ever clip; 3e-4 in the paper, for responses of thousands of tokens."""
    clip_high: float = Field(4e-4, gt=0, lt=0.2)
    """Distance of the clip range's upper end from 1; 4e-4 in the paper. See clip_low."""


class CispoConfig(Section):
    """Clips the importance weight, not the gradient. MiniMax-M1, arXiv 2506.13585, eq. 4."""

    kind: Literal["cispo"]
    weight_upper: float = Field(3.0, ge=1)
    """Upper bound of ρ itself (1 + ε_high), not a distance from 1; below 1 it would shrink on-policy samples."""


class DecoupledPpoConfig(_Clipped):
    """Clipping around a proximal policy, weighted by π_prox/β. AReaL, arXiv 2505.24298, eq. 5."""

    kind: Literal["decoupled_ppo"]
    weight_cap: float = Field(5.0, gt=1)
    """Tokens with a larger π_prox/β are left out; a cap of 1 or below would leave out on-policy tokens."""
    proximal: Literal["recomputed", "interpolated"] = "recomputed"
    """The proximal policy. recomputed: the policy at the start of the step (with one step per batch the clip never
    acts). interpolated: log π_prox = α log β + (1 − α) log π_θ, α = 1/staleness (A-3PO, arXiv 2512.06547)."""


class TisGrpoConfig(_Clipped):
    """GRPO around the step's first policy π, times truncated π/β. Yao et al. 2025 (TIS)."""

    kind: Literal["tis_grpo"]
    importance: ImportanceConfig = ImportanceConfig()
    """Truncated weight π/β, π being the step's first policy."""


class MisGrpoConfig(_Clipped):
    """GRPO around the step's first policy π, times π/β if it is within bounds, else 0. Liu et al. 2025 (MIS)."""

    kind: Literal["mis_grpo"]
    level: Level = "token"
    """Level of the ratio that is masked. token: of each token. sequence: the product over the response. geometric: its
    length-normalised root."""
    mask_low: float = Field(0.5, ge=0, lt=1)
    """Lower bound of π/β; below 1, so that on-policy samples are kept."""
    mask_high: float = Field(5.0, gt=1)
    """Upper bound of π/β; above 1, so that on-policy samples are kept."""


class M2poConfig(_DualClip):
    """Masks the fewest tokens that bring the second moment of log ρ down to τ. arXiv 2510.01161."""

    kind: Literal["m2po"]
    tau: float = Field(0.04, gt=0)
    """τ: bound on the second moment of log ρ over the tokens that are kept. Lower it to mask more."""


class SapoConfig(Section):
    """A soft gate in place of a clip. arXiv 2511.20347, eq. 5."""

    kind: Literal["sapo"]
    tau_positive: float = Field(1.0, gt=0)
    """Gate temperature for positive advantages; a higher one fades sooner as ρ leaves 1."""
    tau_negative: float = Field(1.05, gt=0)
    """Gate temperature for negative advantages; at least tau_positive, because these spread over the vocabulary."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if the gate fades more slowly for negative advantages than for positive ones."""
        if self.tau_negative < self.tau_positive:
            yield (
                f"tau_negative={self.tau_negative:g} must be at least tau_positive={self.tau_positive:g}, because "
                "negative advantages must fade faster or training destabilises; raise it (1.05 in the paper)"
            )


class DppoConfig(Section):
    """Masks outward tokens whose probability moved too far from β. arXiv 2602.04879, eq. 12."""

    kind: Literal["dppo"]
    divergence: Literal["tv", "kl"] = "tv"
    """Distance between β and π_θ, the sampled token against all others. tv: |π_θ − β|. kl: KL(β ‖ π_θ), which weighs
    shifts near 0 and 1 more."""
    threshold: float | None = Field(None, gt=0)
    """δ: an outward token whose distance exceeds it has no gradient. Lower it to mask more. null: 0.15 for tv, 0.05 for
    kl, as in the paper's section 5; its larger runs have 0.2 and 0.05."""
    weight_upper: float | None = Field(5.0, ge=1)
    """Upper bound C of ρ; below 1 it would shrink on-policy samples. 5 in the paper's larger runs. null: none, as
    in its section 5, where truncation at 3 made other methods less stable."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if the threshold cannot be exceeded, because a probability shifts by at most 1."""
        if self.divergence == "tv" and self.threshold is not None and self.threshold >= 1:
            yield (
                f"threshold={self.threshold:g} must be below 1 for divergence: tv, because a probability shifts by at "
                "most 1 and nothing would be masked; lower it (0.15 in the paper)"
            )


class DrpoConfig(Section):
    """A quadratic regulariser on the shift of a token's probability replaces DPPO's mask. arXiv 2606.09821, eq. 8."""

    kind: Literal["drpo"]
    threshold: float = Field(12.5, gt=0)
    """δ: shift of the token's probability at which an outward gradient is 0; beyond it, it points back. 12.5 is the
    value of the authors' code, and keeps each gradient within 8 % of its unregularised size. Shifts never exceed 1, so
    set a value below 1 (0.15, as in dppo) for a bound that acts."""
    weight_upper: float | None = Field(None, ge=1)
    """Upper bound of ρ; below 1 it would shrink on-policy samples. Set it (5, as in dppo) if rare tokens own the
    gradient. null: none, as in the authors' code."""


class ReinforceConfig(Section):
    """REINFORCE with the group's mean as baseline and truncated importance weights."""

    kind: Literal["reinforce"]
    importance: ImportanceConfig = ImportanceConfig()
    """Weights π_θ/β of the per-token losses."""


class UserObjectiveConfig(Section):
    """Your own loss and advantage, as functions that are imported. docs/algorithm.md, "Your own loss and advantage"."""

    kind: Literal["user"]
    loss: FunctionPath
    """The function (batch: TokenBatch, **params) -> the loss of each token, a tensor [N], or a TokenLoss, which also
    tells the tokens on which a clip acted."""
    advantage: FunctionPath | None = None
    """The function (batch: StepBatch, **params) -> the advantage of each rollout, a tensor [Q, G]. null: that of GRPO,
    normalised in each group."""
    params: dict[str, JsonValue] = Field({})
    """Arguments of the functions by name; each function gets those that it takes."""
    needs_log_ratio: bool = False
    """Compute StepBatch.log_ratio for the advantage. It costs one more forward pass over the batch; without it the
    field is None."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if log-ratios would be computed that no function reads."""
        if self.needs_log_ratio and self.advantage is None:
            yield (
                "needs_log_ratio=true needs an advantage that reads StepBatch.log_ratio, and advantage is null: "
                "remove needs_log_ratio (the loss has TokenBatch.log_ratio without it) or set advantage"
            )


ObjectiveConfig = Annotated[
    QuatroConfig
    | GrpoConfig
    | DrGrpoConfig
    | DapoConfig
    | GspoConfig
    | CispoConfig
    | DecoupledPpoConfig
    | TisGrpoConfig
    | MisGrpoConfig
    | M2poConfig
    | SapoConfig
    | DppoConfig
    | DrpoConfig
    | ReinforceConfig
    | UserObjectiveConfig,
    Field(discriminator="kind"),
]
