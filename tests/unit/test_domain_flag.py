"""The labels of failure domains on the command line and in the environment."""

from __future__ import annotations

import pytest

from everstep.agents.launch.coordinator_flags import LaunchError
from everstep.agents.launch.domain_flag import labels


def test_labels_of_a_node() -> None:
    assert labels([" zone=a", "rack=7", "rack=7"], {"EVERSTEP_DOMAIN": "rack=9"}) == ("rack=7", "zone=a")
    assert labels([], {"EVERSTEP_DOMAIN": "zone=a, rack=7,"}) == ("rack=7", "zone=a")
    assert labels([], {}) == ()


@pytest.mark.parametrize("text", ["rack", "rack=", "=7", "ra ck=7", "rack=a,b", "", "rack=a\nb", "7=rack"])
def test_a_label_that_means_nothing(text: str) -> None:
    with pytest.raises(LaunchError, match="--es-domain: expected KIND=VALUE, such as rack=7: got"):
        labels([text], {})


def test_a_node_is_in_one_domain_of_a_kind() -> None:
    with pytest.raises(LaunchError, match="not in both rack=7 and rack=8"):
        labels(["rack=8", "rack=7"], {})
