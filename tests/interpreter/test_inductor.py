"""What Inductor is told: its own faults are mended where this torch has them, and nowhere else."""

from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

from diffkiln.interpreter.inductor import declared_once


class OfTorch211:
    """Its cache of declared arrays, which knows a place by the address of a bound method."""

    def __init__(self):
        self.codegen_int_array_var_cache = {}
        self.lines = []

    def codegen_int_array_var(self, int_array, writeline, known_statically=False, graph=None):
        key = int_array, id(writeline), known_statically, id(graph) if graph else None
        if key not in self.codegen_int_array_var_cache:
            self.codegen_int_array_var_cache[key] = self._codegen_int_array_var_impl(int_array, writeline, False)
        return self.codegen_int_array_var_cache[key]

    def _codegen_int_array_var_impl(self, int_array, writeline, known_statically):
        writeline(int_array)
        return f"int_array_{len(self.lines)}"

    def write(self, line):
        self.lines.append(line)


def test_an_array_is_declared_once_for_a_place_whichever_method_object_names_it():
    original = OfTorch211.codegen_int_array_var
    with declared_once(OfTorch211):
        first, second = OfTorch211(), OfTorch211()
        kept = [first.write for _ in range(8)]  # each another object
        assert {first.codegen_int_array_var("{1L}", method) for method in kept} == {"int_array_1"}
        assert first.codegen_int_array_var("{2L}", first.write) == "int_array_2"
        assert first.codegen_int_array_var("{1L}", second.write) != "int_array_1"
    assert first.lines == ["{1L}", "{2L}"]
    assert second.lines == ["{1L}"]
    assert OfTorch211.codegen_int_array_var is original


def test_a_torch_that_knows_places_is_left_alone():
    class Mended(OfTorch211):
        def codegen_int_array_var(self, int_array, writeline, known_statically=False, graph=None):
            return id(writeline.__self__)

    own = Mended.codegen_int_array_var
    with declared_once(Mended):
        assert Mended.codegen_int_array_var is own
    with declared_once(CppWrapperCpu):  # whichever this is, it is put back
        pass
    assert CppWrapperCpu.codegen_int_array_var.__qualname__ == "CppWrapperCpu.codegen_int_array_var"
