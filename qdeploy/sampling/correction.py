"""Mean errors of a quantized network subtracted while sampling (QNCD, arXiv 2403.19140, section 3.2).

``pipe.unet = Corrected(pipe.unet, correction)``: a stock pipeline calls the network as before. A correction is a
`TableCorrection`, which costs nothing, or an `OnlineCorrection`, which calls the network once more in every few
steps. Departures of the latter from the released code, each for a reason:

- it corrects what the network predicts, so any sampler of epsilon- or v-predictions runs on it; the code
  changes one sampler;
- the mean is each image's own; the code's runs over the batch, and so ties images to each other;
- noise comes from a generator of its own: seeds yield the same initial noise as without correction;
- nothing is kept from one trajectory to the next; the code corrects the first steps of an image by the error
  of the one before;
- the injected noise has mean 0 exactly, so it adds nothing to the estimate; and what could be chance is no
  error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from qdeploy.engines.drop_in.denoiser import DenoiserOutput
from qdeploy.model.call import signature_of, time_parameter
from qdeploy.store.correction_table import CorrectionTable, prediction_type
from qdeploy.system.errors import InvalidInputError, UsageError

EVERY = 10  # the paper's interval
GUARD = 3.0
_LEAST_SIGNAL = 1e-4  # below this alpha_bar a v-prediction holds no information on epsilon


class Correction(Protocol):
    """Removes the mean error from predictions."""

    def __call__(
        self, predict: Callable[[Tensor], Tensor], sample: Tensor, timestep: Tensor, output: Tensor
    ) -> Tensor:
        """The corrected prediction.

        Args:
            predict: the network at this timestep, for another sample.
            sample: [B, ...] what the network was given.
            timestep: [1] or [B].
            output: [B, ...] what it predicts.
        """


class Corrected(diffusers.ModelMixin, ConfigMixin):
    """A denoiser whose predictions are corrected, in place of the denoiser.

    Args:
        denoiser: a diffusers model, or an object with the same interface.
        correction: what is done to its predictions.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(self, denoiser: nn.Module, correction: Correction) -> None:
        super().__init__()
        self.denoiser, self.correction = denoiser, correction
        self._internal_dict: Any = denoiser.config
        self.signature = signature_of(denoiser)

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's."""
        dtype: torch.dtype = self.denoiser.dtype  # type: ignore[assignment]
        return dtype

    @property
    def device(self) -> torch.device:
        """The denoiser's."""
        device: torch.device = self.denoiser.device  # type: ignore[assignment]
        return device

    def forward(self, *args: Any, **kwargs: Any) -> DenoiserOutput | tuple[Any, ...]:
        """Predict. Takes what the denoiser takes."""
        given = dict(self.signature.bind(*args, **kwargs).arguments)
        wanted = bool(given.pop("return_dict", True))
        extra = given.pop("kwargs", {})
        name = next(iter(self.signature.parameters))

        def predict(sample: Tensor) -> Tensor:
            result: Tensor = self.denoiser(**{**given, name: sample}, **extra, return_dict=False)[0]
            return result

        sample: Tensor = given[name]
        output = predict(sample)
        timestep = (
            torch.as_tensor(given[str(time_parameter(self.signature.parameters))]).float().flatten().cpu()
        )
        result = self.correction(predict, sample, timestep, output)
        return DenoiserOutput(sample=result) if wanted else (result,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "denoiser" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.denoiser, name)


class TableCorrection:
    """Subtract the mean error that was measured at the nearest timestep."""

    def __init__(self, table: CorrectionTable) -> None:
        self.table = table

    def __call__(
        self, predict: Callable[[Tensor], Tensor], sample: Tensor, timestep: Tensor, output: Tensor
    ) -> Tensor:
        """See `Correction`.

        Raises:
            InvalidInputError: the prediction has another number of channels.
        """
        means = self.table.nearest(timestep)
        axis = 2 if output.ndim == 3 else 1
        if means.shape[1] != output.shape[axis]:
            raise InvalidInputError(
                f"the correction table has {means.shape[1]} channels, and predictions have {output.shape[axis]}"
            )
        shape = [len(means)] + [1] * (output.ndim - 1)
        shape[axis] = -1
        return output - means.to(output).view(shape)


class OnlineCorrection:
    """Subtract the mean error that is estimated on the way (QNCD, section 3.2).

    In call i with ``(i - 1) mod N = N div 2`` the next, cleaner sample is noised back to the level that it came
    from, and the network predicts the noise: its mean over an image, which should be 0, is the image's mean
    error mu until the next estimate. An estimate within ``guard`` standard deviations of what a perfect
    network's could be is 0. Under classifier-free guidance both halves of the batch show the same images:
    these share noise and estimate, so the guided prediction is corrected by mu, whatever the scale.

    Every call is corrected, also where a sampler makes several in a step. The estimate takes the true noise's
    mean for 0. A network that reads a drift of its image's brightness as noise contradicts this, and is then
    corrected too far; the table knows the true error.

    Args:
        scheduler: of the pipeline, for its noise levels.
        every: N, calls between estimates.
        guard: in standard deviations.
        seed: of the injected noise.

    Attributes:
        calls: extra calls of the network so far.

    Raises:
        InvalidInputError: the scheduler takes predictions for something else than noise or v.
        UsageError: an impossible interval or guard.
    """

    def __init__(self, scheduler: Any, every: int = EVERY, guard: float = GUARD, seed: int = 0) -> None:
        if every < 1 or not guard >= 0:
            raise UsageError(f"the interval must be at least 1 and the guard 0 or more, not {every}, {guard}")
        name = type(scheduler).__name__
        self.kind = prediction_type({**scheduler.config, "_class_name": name})
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if self.kind not in ("epsilon", "v_prediction") or alphas is None:
            raise InvalidInputError(
                f"the online correction is for predictions of epsilon or v, and {name} takes them for "
                f"{self.kind}: choose --correction none"
            )
        self.alphas_cumprod = torch.as_tensor(alphas).double().cpu()
        self.scheduler, self.every, self.guard, self.seed = scheduler, every, guard, seed
        self.calls = 0
        self._begin()

    def _begin(self) -> None:
        self._index, self._last = 0, math.inf
        self._mu: Tensor | None = None
        self._schedule = getattr(self.scheduler, "timesteps", None)

    def __call__(
        self, predict: Callable[[Tensor], Tensor], sample: Tensor, timestep: Tensor, output: Tensor
    ) -> Tensor:
        """See `Correction`."""
        t = float(timestep[0])
        stale = self._mu is not None and len(self._mu) != len(output)
        # Each run of a pipeline sets the schedule again, and begins at its highest timestep.
        if stale or t > self._last or getattr(self.scheduler, "timesteps", None) is not self._schedule:
            self._begin()
        index, self._index, self._last = self._index, self._index + 1, t
        alpha = self.alpha_bar(t)
        silent = self.kind == "v_prediction" and alpha < _LEAST_SIGNAL
        if (index - 1) % self.every == self.every // 2 and not silent:
            self._mu = self._estimate(predict, sample, t, output)
            self.calls += 1
        if self._mu is None or silent:
            return output
        corrected = output.clone()
        scale = math.sqrt(alpha) if self.kind == "v_prediction" else 1.0
        channels = min(sample.shape[1], output.shape[1])
        corrected[:, :channels] -= (self._mu / scale).to(output).view(-1, *[1] * (output.ndim - 1))
        return corrected

    def alpha_bar(self, timestep: float) -> float:
        """The signal's share of the variance at a timestep; between two of training by its logarithm."""
        last = len(self.alphas_cumprod) - 1
        place = min(max(timestep, 0.0), float(last))
        low = int(place)
        both = self.alphas_cumprod[[low, min(low + 1, last)]].clamp(min=1e-12).log()
        return float(torch.lerp(both[0], both[1], place - low).exp())

    def _next_alpha_bar(self, t: float) -> float:
        schedule = torch.as_tensor(self.scheduler.timesteps).double().flatten()
        lower = schedule[schedule < t - 1e-6]
        return self.alpha_bar(float(lower.max())) if len(lower) else 1.0

    def _estimate(
        self, predict: Callable[[Tensor], Tensor], sample: Tensor, t: float, output: Tensor
    ) -> Tensor:
        """[B] the mean error mu of each row's image."""
        alpha, alpha_next = self.alpha_bar(t), self._next_alpha_bar(t)
        channels = min(sample.shape[1], output.shape[1])
        x = sample[:, :channels]
        epsilon = self._to_epsilon(x, output[:, :channels], alpha)
        noise = self._noise(x, t)
        x0 = (x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
        cleaner = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next) * epsilon
        f = alpha / alpha_next
        again = math.sqrt(f) * cleaner + math.sqrt(max(0.0, 1 - f)) * noise
        seen = predict(torch.cat([again, sample[:, channels:]], 1).to(sample.dtype))
        d = (self._to_epsilon(again, seen[:, :channels], alpha) - noise).flatten(1)
        if _guided(sample):
            both = torch.stack(d.chunk(2)).mean(0)
            d = torch.cat([both, both])
        mu = d.mean(1)
        significant = mu.abs() > self.guard * d.std(1) / math.sqrt(d.shape[1])
        return torch.where(significant, mu, torch.zeros_like(mu))

    def _to_epsilon(self, x: Tensor, prediction: Tensor, alpha: float) -> Tensor:
        if self.kind == "epsilon":
            return prediction
        return math.sqrt(alpha) * prediction + math.sqrt(1 - alpha) * x

    def _noise(self, x: Tensor, t: float) -> Tensor:
        """[1, ...] noise for every row, with mean 0, that depends on seed and timestep only."""
        generator = torch.Generator().manual_seed((self.seed << 32) + round(1000 * t))
        noise = torch.randn(x.shape[1:], generator=generator, dtype=torch.float32)
        return (noise - noise.mean())[None].to(x)


def _guided(sample: Tensor) -> bool:
    """Whether both halves of a batch show the same images, as under classifier-free guidance."""
    if len(sample) % 2:
        return False
    first, second = sample.chunk(2)
    return torch.equal(first, second)
