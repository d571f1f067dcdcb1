"""common.staging: host arrays by name, copied to the device in one go."""

import numpy as np
import pytest
from numba import cuda

from common.staging import Staging


def test_what_is_written_arrives_under_its_name():
    staging, stream = Staging({"rows": 3, "table": (2, 5)}, copies=2), cuda.stream()
    assert not any(array.copy_to_host().any() for array in staging.device.values())
    for value in range(5):
        host = staging.next()
        host["rows"][:], host["table"][:] = value, np.arange(10).reshape(2, 5) + value
        staging.upload(stream)
        stream.synchronize()
        assert staging.device["rows"].copy_to_host().tolist() == [value] * 3
        np.testing.assert_array_equal(staging.device["table"].copy_to_host(), np.arange(10).reshape(2, 5) + value)


def test_what_may_still_be_copied_is_not_written_next():
    staging = Staging({"rows": 4}, copies=3)
    hosts = [staging.next()["rows"] for _ in range(4)]
    assert hosts[3] is hosts[0] and not any(np.shares_memory(hosts[0], other) for other in hosts[1:3])


def test_no_copy_at_all_is_refused():
    with pytest.raises(ValueError, match="copies = 0"):
        Staging({"rows": 4}, copies=0)
