"""What rewards and environments need to run foreign code and foreign models: killable processes, a chat client."""

# ruff: noqa: F401 (what is imported here is this room's public names)
from stateset_lightning.workers.openai_client import OpenAIClient
from stateset_lightning.workers.pool import WorkerDied, WorkerPool
