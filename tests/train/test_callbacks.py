from accelerate import Accelerator
from transformers import TrainerCallback

from apportion.train.callbacks import Callbacks


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = args is not None and state.global_step == 2


def test_a_callback_hears_of_steps_and_may_stop_the_run():
    callbacks = Callbacks([Stops()], max_steps=3)
    callbacks.step_end(1, {})
    assert not callbacks.stop
    callbacks.step_end(2, {})
    assert callbacks.stop


def test_callbacks_leave_the_state_of_accelerate_alone():
    accelerator = Accelerator(cpu=True)
    Callbacks([Stops()], max_steps=1)
    assert accelerator.num_processes == 1
