"""For all tests: a busy machine is no fault of a property, and of many cases a quick run draws some."""

from hypothesis import HealthCheck, settings

from sampling import (  # noqa: F401 - hooks
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_report_header,
)

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
