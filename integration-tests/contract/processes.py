"""The tests of the contract that need one process, where a server has several; all others run in several, and see no difference.

On such a server the connections of a test go to its workers in turn, and what a test and its handlers share is kept the same in
all processes (``support/workers.py``). What is listed here is about one process, and says why.
"""

from collections.abc import Iterator, Mapping, Sequence

from support.servers import Workers

#: One worker takes all connections of these tests, while the others have nothing to do; or there is only one.
_ONE_WORKER: Mapping[tuple[Workers, str], Sequence[str]] = {
    ("one of them", "its requests meet in one pool: each worker has its own"): (
        "test_p07_cancellation::test_storm_of_cancelled_statements_keeps_the_connections",
        "test_p07_cancellation::test_terminated_backend_costs_one_request",
        "test_p13_host_switch::test_request_that_waits_for_the_old_pool_is_served_by_it",
        "test_p13_host_switch::test_twenty_switches_under_load",
        "test_p15_event_loops::test_first_use_by_many_requests_makes_one_engine",
        "test_p16_health::test_status_counts_those_who_wait",
    ),
    ("one of them", "its handler switches the host of its own process"): (
        "test_p13_host_switch::test_handler_that_alternates_under_load",
    ),
    ("one of them", "its handlers wait for a line in the log of their own process"): (
        "test_p16_health::test_quick_request_is_not_named",
    ),
    ("only one", "it counts what the hooks of one process do at startup and shutdown"): (
        "test_p00_driver::test_hooks_run_at_startup_and_shutdown",
        "test_p11_explicit_units::test_lifespan_is_no_unit",
        "test_p11_explicit_units::test_block_works_at_startup_and_shutdown",
        "test_p11_explicit_units::test_worker_of_the_application_has_no_unit_of_a_request",
    ),
}

#: Handlers of these tests run in the process of the test, on the framework's first server.
_THE_TEST: Mapping[str, Sequence[str]] = {
    "requests join the transaction of the test, which is a connection of its process": (
        "test_p12_no_bleeding::test_auto_close_commits_what_requests_wrote",
        "test_p12_no_bleeding::test_deferred_constraint_of_sqlite_is_the_tests_affair",
        "test_p12_no_bleeding::test_hooks_of_the_lifespan_join",
        "test_p12_no_bleeding::test_nothing_is_left_in_the_database",
        "test_p12_no_bleeding::test_other_sessions_of_the_test_are_flushed_and_kept",
        "test_p12_no_bleeding::test_parent_cannot_use_the_connection_of_its_child",
        "test_p12_no_bleeding::test_refused_request_returns_to_its_savepoint",
        "test_p12_no_bleeding::test_request_runs_in_the_tests_transaction",
        "test_p12_no_bleeding::test_requests_see_each_others_commits",
        "test_p12_no_bleeding::test_server_that_was_started_before_the_test_joins",
        "test_p12_no_bleeding::test_several_connects_share",
        "test_p12_no_bleeding::test_swallowed_error_is_no_silent_rollback_in_the_shared_transaction",
        "test_p12_no_bleeding::test_two_connects_to_one_database_share",
        "test_p12_no_bleeding::test_whole_application_lives_and_dies_inside_a_test",
        "test_p15_event_loops::test_application_shuts_down_inside_the_context_of_a_test",
    ),
    "the server is started inside a unit of the test's process": (
        "test_p11_explicit_units::test_server_started_in_a_block_gives_requests_their_own_unit",
        "test_p11_explicit_units::test_server_started_in_a_block_hides_it_from_websockets",
        "test_p12_no_bleeding::test_server_inside_an_open_unit_does_not_join_it",
    ),
    "its handler works the network to the database, which is in the process of the test": (
        "test_p04_commit_before_head::test_check_of_a_database_that_hangs_is_cut",
        "test_p07_cancellation::test_hanging_rollback_is_cut",
        "test_p18_concurrency::test_commit_in_doubt_is_not_repeated",
    ),
    "the test itself uses the pool of its handlers": (
        "test_p08_clean_up::test_connection_lost_in_the_rollback_leaves_a_returned_404",
        "test_p10_nothing_outlives::test_task_that_waits_for_a_connection_gets_a_clear_error",
        "test_p15_event_loops::test_client_with_a_loop_per_call",
    ),
    "the test steps through the task of a handler, or uses what it has left after the server has ended": (
        "test_p07_cancellation::test_cancellation_at_every_suspension_of_a_request",
        "test_p19_errors::test_session_that_outlived_its_request_names_the_remedy",
        "test_p19_errors::test_task_that_outlived_its_request_names_the_remedy",
    ),
    "the test looks at the state of its own process: the application, the host and the engines of a connect": (
        "test_p13_host_switch::test_alternation_at_ten_hertz_under_load",
        "test_p13_host_switch::test_handler_that_returns_none_means_the_current_host",
        "test_p19_errors::test_setup_after_the_start_is_refused",
    ),
    "two servers use one connect, and what a test shares is kept the same with the workers of one server": (
        "test_p19_errors::test_two_applications_share_a_connect",
    ),
}

WORKERS: Mapping[str, Workers] = {test: workers for (workers, _), tests in _ONE_WORKER.items() for test in tests}
WITHIN_THE_TEST: frozenset[str] = frozenset(test for tests in _THE_TEST.values() for test in tests)


def exceptions() -> Iterator[tuple[str, str, str]]:
    """Yield each test that is listed, with where it runs and why."""
    for (workers, why), tests in _ONE_WORKER.items():
        yield from ((test, workers, why) for test in tests)
    for why, tests in _THE_TEST.items():
        yield from ((test, "the test", why) for test in tests)
