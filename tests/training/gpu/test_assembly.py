"""Reading assembly, by texts short enough to count by hand."""

from types import SimpleNamespace

import pytest

from fambav_training.gpu.assembly import _amd_code, _loops, _nvidia_code, assembly_of

# Two nested loops; the inner one loads, waits for it and jumps by address, as sm_100's code does.
_NVIDIA = """Function:_kernel
--:-:-:-:2	MOV R1, R2;
LBB0:
--:-:-:-:4	IADD3 R1, R1, 0x1, RZ;
--:-:0:-:1	@!P1 LDG.E.U16 R45, desc[UR32][R4.64];
01:-:-:Y:5	FADD R62, R45, R2;
--:-:1:-:1	MUFU.EX2 R5, R62;
02:2:-:-:1	@!P1 STG.E desc[UR32][R48.64], R5;
--:-:-:-:5	BRA.U UP0, 0x20;
--:-:-:-:5	@P6 BRA LBB0;
--:-:-:-:5	EXIT;
LBB1:
--:-:-:Y:0	BRA LBB1;
"""
_AMD = """	.text
_kernel:
	s_load_dwordx2 s[4:5], s[0:1], 0x0
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_ushort v39, v39, s[8:11], 0 offen
	s_waitcnt vmcnt(0)
	v_exp_f32_e32 v48, v39
	ds_bpermute_b32 v1, v2, v3
	s_cbranch_scc0 .LBB0_2
	s_endpgm
.Lfunc_end0:
	.size	_kernel, .Lfunc_end0-_kernel
    .private_segment_fixed_size: 24
    .vgpr_count:     164
"""


def test_the_innermost_loop_of_nvidia_code():
    has_loops, (loop,) = _loops(_nvidia_code(_NVIDIA), timed=True)
    assert has_loops and loop.instructions == 5
    assert {kind: count for kind, count in loop.counts.items() if count} == {"load": 1, "store": 1, "special": 1}
    # 500 until the load is there, 5 of the sum, 20 of the exponential, 1 of the store and 5 of the jump
    assert loop.cycles == 500 + 5 + 20 + 1 + 5


def test_code_without_a_loop_is_taken_whole():
    code = _nvidia_code("\n".join(line for line in _NVIDIA.splitlines() if "BRA" not in line or "LBB1" in line))
    has_loops, (whole,) = _loops(code, timed=True)
    assert not has_loops and whole.instructions == len(code) == 8


def test_amd_code():
    assembly = assembly_of(SimpleNamespace(asm={"amdgcn": _AMD}))
    assert (assembly.registers, assembly.spills, assembly.has_loops) == (164, 24, True)
    (loop,) = assembly.loops
    assert loop.instructions == 5 and loop.cycles is None
    assert {kind: count for kind, count in loop.counts.items() if count} == {"load": 1, "special": 1, "shuffle": 1}
    assert len(_amd_code(_AMD)) == 7


def test_other_kernels_are_refused():
    with pytest.raises(ValueError, match=r"kernel of \['spv'\]: expected a cubin or amdgcn"):
        assembly_of(SimpleNamespace(asm={"spv": b""}))
