"""Arguments of the commands that are not LightningCLI's: errors in a line, and what only the user may say."""

import pytest

from stateset_lightning.cli.arguments import Arguments, loading_options
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import LoadingOptions


def parsed(*words):
    parser = Arguments("generate", "Try a model.")
    parser.add_argument("--samples", type=int)
    parser.add_loading_options()
    return parser.parse_args(words)


def test_loading_options_are_the_users():
    assert loading_options(parsed()) == LoadingOptions()
    given = parsed("--trust_remote_code", "--revision", "v2", "--model_kwargs", '{"variant": "fp16"}')
    assert loading_options(given) == LoadingOptions(
        revision="v2", trust_remote_code=True, model_kwargs={"variant": "fp16"}
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "two"], "argument --samples: invalid int value: 'two'"),
        (["--model_kwargs", "{"], "argument --model_kwargs: { must be a JSON object, such as"),
        (["--model_kwargs", "[1]"], "argument --model_kwargs: [1] must be a JSON object, such as"),
        (["--sample", "1"], "unrecognized arguments: --sample 1"),  # no abbreviations
    ],
)
def test_an_error_is_a_line_that_names_the_command(words, said):
    with pytest.raises(ConfigError) as refused:
        parsed(*words)
    assert str(refused.value).startswith(said)
    assert str(refused.value).endswith("; see stateset-lightning generate --help")
