"""The YAML of the guide's command-line section, word for word (test_guide.py compares where the guide is at hand)."""

GUIDE = """\
agent:
  model_name: "gpt2"
  max_new_tokens: 50
  temperature: 0.7

environment:
  type: "conversation"
  scenarios:
    - id: "simple_qa"
      topic: "question_answering"
      context: "Answer questions"
      user_responses:
        - "What is machine learning?"
        - "Explain neural networks"

training:
  num_episodes: 20
  max_turns: 1  # Single turn
  learning_rate: 5e-5
"""
