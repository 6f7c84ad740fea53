"""Inputs from words: what is understood, what is drawn, what is refused."""

import pytest
import torch

from sparsefx.cli.inputs import InputSpec, draw_inputs, parse_input
from sparsefx.cli.results import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("float32[4,16]", InputSpec("", torch.float32, (4, 16))),
        (" x=bfloat16[ 4 , 1 , 3 ] ", InputSpec("x", torch.bfloat16, (4, 1, 3))),
        ("int64[2,32]:0..255", InputSpec("", torch.int64, (2, 32), (0, 255))),
        ("input_ids=int32[7]:-3..-1", InputSpec("input_ids", torch.int32, (7,), (-3, -1))),
        ("float64[]", InputSpec("", torch.float64, ())),
        ("float32[0,5]:0..1", InputSpec("", torch.float32, (0, 5), (0.0, 1.0))),
        ("float32[1]:-.5..1e-3", InputSpec("", torch.float32, (1,), (-0.5, 1e-3))),
        ("float16[1]:0.25..0.75", InputSpec("", torch.float16, (1,), (0.25, 0.75))),
        ("uint8[3]:0..254", InputSpec("", torch.uint8, (3,), (0, 254))),
        ("bool[3]:1..1", InputSpec("", torch.bool, (3,), (1, 1))),
    ],
)
def test_words(text: str, spec: InputSpec):
    assert parse_input(text) == spec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int8", "bool"])
def test_what_is_drawn(dtype: str):
    generator = torch.Generator().manual_seed(0)
    drawn = parse_input(f"{dtype}[50,3]").draw(generator)
    assert (drawn.dtype, drawn.shape) == (getattr(torch, dtype), (50, 3))
    assert len(drawn.unique()) > 1
    low, high = (-2, 3) if dtype == "int8" else (0, 1)
    drawn = parse_input(f"{dtype}[500]:{low}..{high}").draw(generator)
    assert low <= drawn.min()
    assert drawn.max() <= high
    if not drawn.is_floating_point():
        assert len(drawn.unique()) == high - low + 1  # both ends


def test_places_names_and_seeds():
    texts = ["float32[2]", "b=int64[2]:0..9", "float32[3]", "a=bool[]"]
    args, kwargs = draw_inputs(texts, 5, CPU)
    assert [tuple(arg.shape) for arg in args] == [(2,), (3,)]
    assert {name: t.dtype for name, t in kwargs.items()} == {"b": torch.int64, "a": torch.bool}
    again, _ = draw_inputs(texts, 5, CPU)
    other, _ = draw_inputs(texts, 6, CPU)
    assert torch.equal(args[0], again[0])
    assert not torch.equal(args[0], other[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--input '' must be [NAME=]DTYPE[SIZES][:LOW..HIGH], such as float32[4,16]"),
        ("float32", "must be [NAME=]DTYPE"),
        ("float32[4,-1]", "must be [NAME=]DTYPE"),
        ("float32[2.5]", "must be [NAME=]DTYPE"),
        ("1=float32[2]", "must be [NAME=]DTYPE"),
        ("float32[2]:3", "must be [NAME=]DTYPE"),
        ("float32[2]0..1", "must be [NAME=]DTYPE"),
        ("float[2]", "--input 'float[2]': 'float' is not one of float32, float64, float16"),
        ("float32[2,,3]", "sizes are whole numbers with commas between: [4,16]"),
        ("float32[2 3]", "sizes are whole numbers"),
        ("float32[2,]", "sizes are whole numbers"),
        ("int64[2]:0..1.5", "limits of torch.int64 are whole numbers: invalid literal"),
        ("float32[2]:a..b", "limits of torch.float32 are numbers: could not convert"),
        ("int64[2]:3..1", "3..1 must rise, within"),
        ("int8[2]:0..200", "0..200 must rise, within -128..127 of torch.int8"),
        ("bool[2]:0..2", "0..2 must rise, within 0..1 of torch.bool"),
        ("float32[2]:nan..1", "nan..1.0 must rise"),
        ("float32[2]:0..inf", "0.0..inf must rise"),
        ("float16[2]:0..1e6", "must rise, within -65504.0..65504.0 of torch.float16"),
    ],
)
def test_refusals(text: str, message: str):
    with pytest.raises(UsageError) as caught:
        parse_input(text)
    assert message in str(caught.value)


def test_refusals_of_several():
    with pytest.raises(UsageError, match=r"--input a=\.\.\. stands twice: give each argument once"):
        draw_inputs(["a=bool[1]", "a=bool[2]"], 0, CPU)
    with pytest.raises(UsageError, match="the model's inputs are missing"):
        draw_inputs([], 0, CPU)
