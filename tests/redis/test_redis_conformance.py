"""The Redis tier keeps the promises of all remote tiers, on a real server, over both sockets."""

import pytest

from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_settings import REMOTE_WINDOW_BYTES, Pace, check_settings
from tests.unit.test_remote_tiers import (  # noqa: F401  # run here with the tier below
    test_a_removed_shard_is_a_miss,
    test_a_root_that_does_not_match_is_a_miss,
    test_a_shard_of_another_size_is_a_miss,
    test_another_key_never_gets_these_bytes,
    test_what_was_written_is_read,
    test_writing_a_key_again_replaces_it_and_takes_no_more_room,
)


@pytest.fixture(params=["unix", "tcp", "tcp, spread over lanes"])
def tier(request, server):
    url = server.unix_url if request.param == "unix" else server.url
    pace = Pace(3, REMOTE_WINDOW_BYTES) if "spread" in request.param else None
    opened = RedisTier(check_settings(url, timeout_seconds=5.0), pace=pace)
    yield opened
    opened.close()
