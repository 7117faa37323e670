// The matrix products by themselves, for tests: pack, quantise and multiply in one call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "matrix.h"
#include "memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headrace {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Order = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float>;

Format format_of(const std::string& name) {
    for (int f = 0; f < format_count; f++)
        if (name == format_name(Format(f))) return Format(f);
    throw std::invalid_argument("unknown weight format '" + name + "'");
}

const Kernels& kernels_of(const std::string& isa_wanted) {
    const std::optional<Isa> isa = isa_from_name(isa_wanted);
    if (!isa || !isa_runs(*isa)) throw std::invalid_argument("this machine does not run '" + isa_wanted + "'");
    return kernels(*isa);
}

struct Packed {
    Memory memory;
    PackedMatrix matrix;

    Packed(const std::string& name, int64_t rows, int64_t cols, const Bytes& source, const std::optional<Order>& order)
        : memory(packed_bytes(format_of(name), rows, cols)), matrix(packed_matrix(format_of(name), rows, cols, memory.data())) {
        const size_t wanted = source_row_bytes(matrix.format, cols) * size_t(rows);
        if (cols % block_cols(matrix.format) != 0 || source.size() != wanted || (order && order->size() != size_t(rows)))
            throw std::invalid_argument("a " + name + " weight of this shape has " + std::to_string(wanted) + " bytes, got " + std::to_string(source.size()));
        pack(matrix, source.data(), order ? order->data() : nullptr, 0, matrix.tiles());
    }
};

Result result(std::vector<float> values, size_t rows, size_t cols) {
    auto* kept = new std::vector<float>(std::move(values));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
    return Result(kept->data(), {rows, cols}, owner);
}

Result values(const std::string& format, int64_t rows, int64_t cols, const Bytes& source, const std::optional<Order>& order) {
    const Packed packed(format, rows, cols, source, order);
    std::vector<float> out(size_t(rows * cols));
    for (int64_t row = 0; row < rows; row++) unpack_row(packed.matrix, row, out.data() + row * cols);
    return result(std::move(out), size_t(rows), size_t(cols));
}

Result product(const std::string& isa_wanted, const std::string& format, const std::string& quantised, int64_t rows, const Bytes& source, const Rows& x, int64_t rows_at_once,
               int64_t tiles_at_once) {
    const Kernels& set = kernels_of(isa_wanted);
    const int64_t count = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
    const Packed packed(format, rows, cols, source, std::nullopt);
    const Recipe recipe = recipe_of(packed.matrix.format, quantised_recipe(quantised));
    const Memory memory(activation_bytes(recipe, count, cols));
    const Activation input = activation(recipe, count, cols, memory.data());
    for (int64_t row = 0; row < count; row++) set.quantise_row(input, row, x.data() + row * cols);
    std::vector<float> y(size_t(count * rows));
    const Product p{&packed.matrix, &input, y.data(), rows};
    for (int64_t row = 0; row < count; row += rows_at_once)
        for (int64_t tile = 0; tile < packed.matrix.tiles(); tile += tiles_at_once)
            set.multiply(p, row, std::min(count, row + rows_at_once), tile, std::min(packed.matrix.tiles(), tile + tiles_at_once));
    return result(std::move(y), size_t(count), size_t(rows));
}

// Whether screening keeps each tile for some of the rows, given what their best is not below: [rows][tiles].
Result screening(const std::string& isa_wanted, const std::string& quantised, int64_t rows, const Bytes& source, const Rows& x, const Rows& least, int64_t rows_at_once) {
    const Kernels& set = kernels_of(isa_wanted);
    const int64_t count = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
    const Packed packed(format_name(Format::Q8_0_APART), rows, cols, source, std::nullopt);
    const int64_t tiles = packed.matrix.tiles();
    if (int64_t(least.shape(0)) != count || int64_t(least.shape(1)) != tiles) throw std::invalid_argument("least needs a value for each row and tile");
    const Recipe recipe = quantised_recipe(quantised);
    if (recipe == Recipe::row) throw std::invalid_argument("the recipe 'row' has no screening");
    const Memory memory(activation_bytes(recipe, count, cols));
    const Activation input = activation(recipe, count, cols, memory.data());
    std::vector<Reach> reach(static_cast<size_t>(count));
    std::vector<float> kept(size_t(count * tiles)), own(static_cast<size_t>(count));
    for (int64_t row = 0; row < count; row++) set.quantise_row(input, row, x.data() + row * cols), reach[size_t(row)] = screening_reach(input, row);
    const Product p{&packed.matrix, &input, nullptr, 0};
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t first = 0; first < count; first += rows_at_once) {
            const int64_t past = std::min(count, first + rows_at_once);
            for (int64_t row = first; row < past; row++) own[size_t(row)] = least.data()[row * tiles + tile];
            const bool found = set.screen(p, first, past, tile, reach.data(), own.data());
            for (int64_t row = first; row < past; row++) kept[size_t(row * tiles + tile)] = found;
        }
    return result(std::move(kept), size_t(count), size_t(tiles));
}

}  // namespace

void bind_matrix(nb::module_& module) {
    module.def("matrix_values", &values, "format"_a, "rows"_a, "cols"_a, "source"_a, "row_order"_a.none());
    module.def("matrix_product", &product, "isa"_a, "format"_a, "recipe"_a, "rows"_a, "source"_a, "x"_a, "rows_at_once"_a, "tiles_at_once"_a);
    module.def("matrix_screening", &screening, "isa"_a, "recipe"_a, "rows"_a, "source"_a, "x"_a, "least"_a, "rows_at_once"_a);
}

}  // namespace headrace
