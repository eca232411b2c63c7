"""What rewards and environments need to run foreign code and foreign models: killable processes, a chat client."""

from stateset_lightning.workers.limits import limited
from stateset_lightning.workers.openai_client import OpenAIClient
from stateset_lightning.workers.pool import WorkerDied, WorkerPool

__all__ = ["OpenAIClient", "WorkerDied", "WorkerPool", "limited"]
