"""transformers' trainer callbacks, told what happens in a PPO run."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Callbacks:
    """Call every callback at each event, with the state and control objects that they know.

    A callback may set `control.should_training_stop` and `control.should_save`; what else it sets has no effect here.

    Args:
        callbacks: Instances of `transformers.TrainerCallback`.
        max_steps: Updates of the run.
        context: Passed to each event by name (`model`, `processing_class`).
    """

    def __init__(self, callbacks: Sequence[TrainerCallback], max_steps: int, **context: Any) -> None:
        self.callbacks = list(callbacks)
        self.context = context
        self.state = TrainerState(max_steps=max_steps)
        self.control = TrainerControl()
        self.args = _Settings(use_cpu=True, report_to=[]) if self.callbacks else None

    @property
    def stop(self) -> bool:
        """Whether a callback has asked the run to stop."""
        return self.control.should_training_stop

    @property
    def save(self) -> bool:
        """Whether a callback has asked for a checkpoint; asking is over once it was heard."""
        asked, self.control.should_save = self.control.should_save, False
        return asked

    def begin(self, step: int) -> None:
        """Training begins, or goes on from a step."""
        self.state.global_step = step
        self._tell("on_train_begin")

    def step_end(self, step: int, metrics: dict[str, float]) -> None:
        """One update is done; where it was evaluated, the metrics say so."""
        self.state.global_step = step
        if any(name.startswith("eval/") for name in metrics):
            self._tell("on_evaluate", metrics=metrics)
        self._tell("on_step_end")

    def logged(self, metrics: dict[str, float]) -> None:
        """A line of metrics was written."""
        self.state.log_history.append(metrics)
        self._tell("on_log", logs=metrics)

    def saved(self) -> None:
        """A checkpoint was written."""
        self._tell("on_save")

    def end(self) -> None:
        """Training is over."""
        self._tell("on_train_end")

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, **self.context, **more)


class _Settings(TrainingArguments):
    """Settings for callbacks to read. Devices stay accelerate's: those of transformers would reset its state."""

    @property
    def device(self) -> torch.device:
        """Where the trainer's tensors are does not concern a callback."""
        return torch.device("cpu")
