"""The environment of a step."""

from __future__ import annotations

import pytest

from ling_flow.errors import UserError
from ling_flow.flow.context import Context


def test_labels_may_hold_commas() -> None:
    context = Context.from_environment({"LING_FLOW_REBUILD": '["a,b", "c"]', "LING_FLOW_LABELS": '{"f": "use-2"}'})
    assert (context.rebuild, context.no_cache) == (frozenset({"a,b", "c"}), False)
    assert context.labels == {"f": "use-2"}
    assert Context.from_environment({"LING_FLOW_NO_CACHE": "1"}).no_cache


@pytest.mark.parametrize("text", ["a,b", '{"a": "b"}', "[1]", '"a"'])
def test_what_is_no_list_of_labels_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r'LING_FLOW_REBUILD: must be JSON like \["step"\], got '):
        Context.from_environment({"LING_FLOW_REBUILD": text})
