"""Training: `train(TrainOptions(...))`, and the command `nanogpt-fast train`. trainer.py lists what each file does."""
from .losses import NonFiniteLoss
from .options import TrainOptions
from .trainer import TrainResult, learning_rate, run, train

__all__ = ["NonFiniteLoss", "TrainOptions", "TrainResult", "learning_rate", "run", "train"]
