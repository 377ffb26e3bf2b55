"""sb3-contrib's RecurrentPPO: LSTMs of actor and critic, one step at a time with a state, on CartPole."""

from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from .program import Convert, Learned, Program

ENVIRONMENTS, STEPS, ROLLOUTS, EPOCHS = 8, 64, 2, 4


class _Losses(BaseCallback):
    """Of each rollout the mean of all values; the last loss follows."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.values.append(float(self.model.rollout_buffer.values.mean()))


def build(convert: Convert) -> RecurrentPPO:
    environment = make_vec_env("CartPole-v1", n_envs=ENVIRONMENTS, seed=0)
    model = RecurrentPPO(
        "MlpLstmPolicy",
        environment,
        n_steps=STEPS,
        batch_size=ENVIRONMENTS * STEPS // 4,
        n_epochs=EPOCHS,
        seed=0,
        device="cpu",
    )
    convert(model.policy)
    return model


def run(model: RecurrentPPO) -> Learned:
    losses = _Losses()
    model.learn(ENVIRONMENTS * STEPS * ROLLOUTS, callback=losses)
    losses.values.append(float(model.logger.name_to_value["train/loss"]))
    return Learned(losses.values, [p.detach() for p in model.policy.parameters()])


PROGRAM = Program(
    "sb3-contrib",
    f"RecurrentPPO on CartPole: I=4, H=256, actor and critic, T=1 with hx; {ROLLOUTS} rollouts of "
    f"{ENVIRONMENTS} x {STEPS} steps, {EPOCHS} epochs each",
    "accelerate",
    build,
    run,
)
