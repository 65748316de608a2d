"""What a checkpoint's manifest says of its calibration."""

from __future__ import annotations

from qdeploy.calibrate.session import Session
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.layer import quantized_layers
from qdeploy.store.facts import TimestepFacts


def timestep_facts(session: Session) -> TimestepFacts:
    """What a runtime has to know of timesteps: which were calibrated, and the limits of training."""
    calibrated = session.data.timesteps[session.rows()].float().unique().tolist()
    tables = any(layer.table is not None for layer in quantized_layers(session.denoiser).values())
    exact, span = True if tables else None, session.timestep_range
    if span is not None:
        return TimestepFacts(calibrated=calibrated, low=span.low, high=span.high, range=span, exact=exact)
    if session.training_timesteps is None:
        return TimestepFacts(calibrated=calibrated, exact=exact)
    every = session.all_timesteps()
    return TimestepFacts(calibrated=calibrated, low=float(every.min()), high=float(every.max()), exact=exact)


def by_reason(left: dict[str, str]) -> dict[str, list[str]]:
    """Paths of layers by the reason why they stay in float."""
    return {
        reason: [p for p, why in left.items() if why == reason] for reason in dict.fromkeys(left.values())
    }


def any_attention(session: Session) -> bool:
    """Whether this calibration quantizes attention products."""
    return any(isinstance(module, AttentionQuantizers) for module in session.denoiser.modules())
