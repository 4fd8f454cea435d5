"""The error rule as the kernels' tests apply it: what is rounded right passes, and each fault that it is for is seen."""
import harness
import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rounded(oracle, dtype):
    return oracle.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, ), (3, 1), (8, 7), (64, 100), (300, 384)])
def test_the_correctly_rounded_answer_passes_whatever_the_plain_path_did(dtype, shape):
    oracle = torch.randn(shape, dtype=torch.float64)
    out = rounded(oracle, dtype)
    for plain in (out, oracle, rounded(oracle, torch.bfloat16)):  # plain path as good as the best, exact, and worse
        harness.assert_close_to_oracle(out, oracle, plain, "forward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [1 + 5e-4, 1 - 6.5e-4])  # eps 1e-3 for 1e-5 at variance 1; N-1 for N at C=768
def test_a_scale_that_is_slightly_wrong_is_a_bias(dtype, fault):
    oracle = torch.randn(64, 768, dtype=torch.float64)
    with pytest.raises(AssertionError, match="biased|error"):
        harness.assert_close_to_oracle(rounded(oracle * fault, dtype), oracle, rounded(oracle, dtype), "forward")


def test_truncation_instead_of_rounding_is_seen():
    oracle = torch.randn(64, 64, dtype=torch.float64)
    truncated = (oracle.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(truncated, oracle, rounded(oracle, torch.bfloat16), "forward")


def test_one_wrong_element_among_many_is_seen():
    oracle = torch.randn(64, 768, dtype=torch.float64)
    out = rounded(oracle, torch.bfloat16)
    out[63, 767] += 0.1
    with pytest.raises(AssertionError, match="largest error"):
        harness.assert_close_to_oracle(out, oracle, rounded(oracle, torch.bfloat16), "forward")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_should_be_finite_is_seen(value):
    oracle = torch.randn(4, 4, dtype=torch.float64)
    out = rounded(oracle, torch.float16)
    out[2, 1] = value
    with pytest.raises(AssertionError, match=r"finite.*\(2, 1\)"):
        harness.assert_close_to_oracle(out, oracle, oracle, "gradient")


def test_an_overflow_that_the_dtype_demands_passes():
    oracle = torch.tensor([1e6, 1.0, -1e6], dtype=torch.float64)
    harness.assert_close_to_oracle(rounded(oracle, torch.float16), oracle, rounded(oracle, torch.float16), "forward")


def test_zero_must_stay_zero_when_the_plain_path_is_exact():
    oracle = torch.zeros(8, dtype=torch.float64)
    harness.assert_close_to_oracle(torch.zeros(8), oracle, torch.zeros(8), "forward")
    with pytest.raises(AssertionError, match="largest error"):
        harness.assert_close_to_oracle(torch.full((8, ), 1e-6), oracle, torch.zeros(8), "forward")


def test_a_constant_tensor_is_one_observation_not_a_bias():
    oracle = torch.full((128, 64), 1 / 3, dtype=torch.float64)
    harness.assert_close_to_oracle(rounded(oracle, torch.bfloat16), oracle, rounded(oracle, torch.bfloat16), "forward")


@pytest.mark.parametrize("shape", [(128, 1), (1, 28)], ids=["of a row", "of a column"])
def test_an_error_shared_by_a_row_or_a_column_is_one_observation(shape):
    """As many independent errors as rows, or columns; their mean is far from 0 if each element counts as one."""
    oracle = torch.randn(128, 28, dtype=torch.float64)
    for _ in range(100):
        out, plain = (oracle + 1e-3 * torch.randn(shape) for _ in range(2))
        harness.assert_close_to_oracle(out, oracle, plain, "forward", factor=10.0)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(oracle + 1e-3 * torch.randn(shape) + 3e-3, oracle, plain, "forward", factor=10.0)


def between_two_steps(n=4096):
    """(fp64 numbers a little above 1, their mean's distance from 1, rounded): bf16 has 1, nearest to all, and then 1 + 2^-7."""
    oracle = 1 + 2**-8 * 0.3 * torch.rand(n, dtype=torch.float64)
    return oracle, float(oracle.mean()) - 1, rounded(oracle, torch.bfloat16)


def test_the_bias_of_rounding_once_is_none_of_the_kernels():
    oracle, mean, plain = between_two_steps()
    harness.assert_close_to_oracle(plain, oracle, plain, "forward")
    scattered = torch.where(torch.rand(len(oracle)) < 0.5 * mean * 2**7, 1 + 2**-7, 1.0).to(torch.bfloat16)  # half as biased
    harness.assert_close_to_oracle(scattered, oracle, plain, "forward")


def test_a_bias_against_that_of_rounding_is_seen():
    oracle, mean, plain = between_two_steps()
    up = torch.where(torch.rand(len(oracle)) < 2 * mean * 2**7, 1 + 2**-7, 1.0).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(up, oracle, plain, "forward")


@pytest.mark.parametrize("direction, allowed", [("forward", 2), ("gradient", 3)])
def test_a_bias_that_the_plain_path_has_too_is_allowed_up_to_the_factor(direction, allowed):
    """As tensor cores make it: every sum is cut off, ours and cuBLAS's, and comes out nearer to 0 than it is."""
    oracle = torch.randn(64, 768, dtype=torch.float64)
    off = lambda times: rounded(oracle * (1 - times * 4e-5), torch.float16)     # 4e-5: 50 standard errors of the rounding
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(off(1), oracle, rounded(oracle, torch.float16), direction)
    for times in (0, 1, allowed - 0.2):
        harness.assert_close_to_oracle(off(times), oracle, off(1), direction, tensor_cores=True)
    with pytest.raises(AssertionError, match="biased"):     # a CPU's sums round to nearest: nothing to share
        harness.assert_close_to_oracle(off(1), oracle, off(1), direction, tensor_cores=False)
    for times in (-1, 2 * allowed):
        with pytest.raises(AssertionError, match="biased"):
            harness.assert_close_to_oracle(off(times), oracle, off(1), direction, tensor_cores=True)


def test_a_mean_error_that_the_plain_path_has_by_chance_excuses_nothing():
    for _ in range(20):
        oracle = torch.randn(64, 768, dtype=torch.float64)
        plain, error = (1e-3 * torch.randn(64, 768, dtype=torch.float64) for _ in range(2))
        by_chance = plain - plain.mean() + 2 * plain.std() / plain.numel() ** 0.5       # two standard errors, as in one of 20 runs
        with pytest.raises(AssertionError, match="biased"):
            harness.assert_close_to_oracle(oracle + error - error.mean() + 5e-5, oracle, oracle + by_chance, "gradient", tensor_cores=True)


def test_the_plain_paths_bias_excuses_none_in_another_direction():
    oracle = torch.randn(64, 768, dtype=torch.float64)
    plain, up = rounded(oracle * (1 - 4e-5), torch.float16), rounded(oracle + 4e-5, torch.float16)     # towards 0, and all greater
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(up, oracle, plain, "forward", tensor_cores=True)


def test_what_rounding_a_stored_intermediate_once_makes_is_explained_and_no_more():
    """Cross-entropy's gradient from softmax - 1 in bf16, beside PyTorch's from (softmax - 1) / N, whose bias has the other sign."""
    rows, V, C, N = 2048, 2003, 64, 1755        # 1/1755 lies where bf16 rounds (softmax - 1) / N towards 0
    x, weight = torch.randn(rows, C).bfloat16().double(), (torch.randn(V, C) / 8).bfloat16().double()
    targets = torch.randint(V, (rows,))
    dlogits = torch.softmax(x @ weight.t(), 1)
    dlogits[torch.arange(rows), targets] -= 1
    dlogits[N:] = 0
    exact = dlogits @ weight / N
    stored = rounded(dlogits, torch.bfloat16).double() @ weight / N
    plain = rounded(rounded(dlogits / N, torch.bfloat16).double() @ weight, torch.bfloat16)
    ours = rounded(stored, torch.bfloat16)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(ours, exact, plain, "gradient")
    harness.assert_close_to_oracle(ours, exact, plain, "gradient", stored=stored)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(rounded(stored * (1 + 5e-4), torch.bfloat16), exact, plain, "gradient", stored=stored)


def test_of_several_explanations_each_explains_its_bias_and_all_together_no_more():
    oracle = torch.randn(64, 768, dtype=torch.float64)
    off = lambda by: rounded(oracle * (1 + by), torch.float16)      # by 4e-5: 50 standard errors of the rounding
    exact_sums, truncated, too_large = oracle, oracle * (1 - 4e-5), oracle * (1 + 4e-5)

    def check(by, *stored):
        harness.assert_close_to_oracle(off(by), oracle, off(0), "gradient", stored=stored)
    with pytest.raises(AssertionError, match="biased"):
        check(-4e-5, exact_sums)
    for by in (0, -2e-5, -4e-5):
        check(by, exact_sums, truncated), check(by, truncated, exact_sums)
    for by in (-4e-5, 4e-5):
        check(by, truncated, too_large)
    for by, *stored in ((4e-5, exact_sums, truncated), (-8e-5, exact_sums, truncated), (8e-5, truncated, too_large), (4e-5,)):
        with pytest.raises(AssertionError, match="biased"):
            check(by, *stored)


@pytest.mark.parametrize("tensor_cores", (False, True))
@pytest.mark.parametrize("N", (256, 300, 340, 700))
def test_a_gradient_divided_by_one_row_too_many_is_seen(N, tensor_cores):
    """PyTorch's bias is as large at N = 300; it excuses nothing where what is stored is said."""
    V, C = 1003, 64
    x, weight = torch.randn(N, C).bfloat16().double(), (torch.randn(V, C) / 8).bfloat16().double()
    dlogits = torch.softmax(x @ weight.t(), 1)
    dlogits[torch.arange(N), torch.randint(V, (N,))] -= 1
    exact, stored = dlogits @ weight / N, rounded(dlogits, torch.bfloat16).double() @ weight / N
    plain = rounded(rounded(dlogits / N, torch.bfloat16).double() @ weight, torch.bfloat16)
    options = dict(stored=stored, tensor_cores=tensor_cores)
    harness.assert_close_to_oracle(rounded(stored, torch.bfloat16), exact, plain, "gradient", **options)
    for wrong in (N + 1, N - 1):
        with pytest.raises(AssertionError, match="biased"):
            harness.assert_close_to_oracle(rounded(stored * N / wrong, torch.bfloat16), exact, plain, "gradient", **options)


def test_false_alarms_are_rare():
    for _ in range(200):  # two paths of equal quality and different luck
        oracle = torch.randn(int(torch.randint(1, 40, ())), int(torch.randint(1, 40, ())), dtype=torch.float64)
        out, plain = (rounded(oracle * (1 + 1e-3 * torch.randn_like(oracle)), torch.bfloat16) for _ in range(2))
        harness.assert_close_to_oracle(out, oracle, plain, "forward")
