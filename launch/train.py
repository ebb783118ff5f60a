"""Entry point for launchers: `deepspeed launch/train.py --config ...`, torchrun, srun, or plain python for one process."""

from pipelines.cli_model import train

if __name__ == "__main__":
    train()
