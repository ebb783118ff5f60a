"""Entry point for launchers: `deepspeed launch/train.py --config ...`, torchrun, srun, or plain python for one process."""

from pipelines.cli.model_commands import train

if __name__ == "__main__":
    train()
