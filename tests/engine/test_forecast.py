"""The forecast against a simulation, step by step."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.forecast import Forecast

SEQUENCES = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=8
)  # length now, tokens to come


def blocks(tokens, size):
    return -(-tokens // size)


def simulated_peak(shared, sequences, size):
    """Blocks at the end of every step; a sequence holds its own until the step after its last token."""
    peak = 0
    for step in range(64):
        alive = [min(length + step, length + more) for length, more in sequences if step <= more]
        peak = max(peak, shared + sum(blocks(tokens, size) for tokens in alive))
    return peak


def forecast(shared, sequences, size):
    result = Forecast(shared + sum(blocks(length, size) for length, _ in sequences), size)
    for length, more in sequences:
        own = blocks(length, size)
        result.add(own, own, length, length + more)
    return result.peak()


@settings(max_examples=500, deadline=None)
@given(SEQUENCES, st.integers(0, 5), st.integers(1, 8))
def test_a_forecast_is_never_below_the_simulation_and_at_most_an_interval_early(sequences, shared, size):
    found = forecast(shared, sequences, size)
    assert simulated_peak(shared, sequences, size) <= found
    # what it counts too much: growth and ends within one interval, up to one block and one ending for each sequence
    later = [(length, more + size) for length, more in sequences]
    assert found <= simulated_peak(shared, later, size)


def test_sequences_that_end_one_after_the_other_need_less_than_their_worst_cases():
    sequences = [(8, 8 * k) for k in range(8)]
    worst = sum(blocks(length + more, 8) for length, more in sequences)
    assert (forecast(0, sequences, 8), worst) == (20, 36)
