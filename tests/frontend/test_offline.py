"""What the offline API's parameters become, and which are refused; outputs are tests of `test_llm.py`."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from frontend.client import Model
from frontend.offline import SamplingParams, prepare, prepare_chat
from frontend.tokenizer import Tokenizer
from tests.frontend.fakes import BUNDLE, MODEL

ASKED = Model(MODEL, Tokenizer.from_bundle(BUNDLE))
FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", FIELDS)
def test_what_is_no_finite_number_is_refused_by_name_and_is_not_the_default(field, wrong):
    params = SamplingParams(**{field: {65: wrong} if field == "logit_bias" else wrong})
    with pytest.raises(ValueError, match=f"^{field}: .*finite"):
        prepare(ASKED, "x", params, True)
    with pytest.raises(ValueError, match=f"^{field}: .*finite"):
        prepare_chat(ASKED, [{"role": "user", "content": "x"}], params, {})


def test_a_program_without_logging_sees_no_log():
    program = "import logging, pagewire; pagewire.LLM; logging.getLogger('frontend').warning('request failed')"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert said.stderr == ""
