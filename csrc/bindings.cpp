// The Python face of the native core. Takes raw addresses: the callers in fastseq/ops allocate and check every tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/team.h"
#include "cpu/scratch.h"
#include "cpu/sequence.h"

namespace py = pybind11;

namespace fastseq {
namespace {

using Address = std::uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }

void* at(Address address, int64_t bytes) { return address ? reinterpret_cast<void*>(address + static_cast<Address>(bytes)) : nullptr; }

View view(const py::tuple& v, int64_t bytes = 0) {  // (address, step stride, row stride), strides in elements
  return {at(v[0].cast<Address>(), bytes), v[1].cast<int64_t>(), v[2].cast<int64_t>()};
}

Shape shape_of(int cell, int dtype, bool state_is_f32, int64_t input, int64_t hidden) {
  return {static_cast<CellKind>(cell), static_cast<DType>(dtype), state_is_f32, input, hidden};
}

SequencePlan plan(int64_t steps, int64_t rows, Address lengths, Address batch_sizes) {
  return batch_sizes ? SequencePlan::packed(steps, rows, static_cast<const int64_t*>(at(batch_sizes)))
                     : SequencePlan::padded(steps, rows, static_cast<const int64_t*>(at(lengths)));
}

// `plan`'s order with the layer's resets, a view of bool; address 0: none.
Sequence with_resets(const SequencePlan& plan, const View& resets) {
  Sequence sequence = plan.view();
  sequence.resets = static_cast<const bool*>(resets.data), sequence.reset_step = resets.step, sequence.reset_row = resets.row;
  return sequence;
}

int64_t columns(CellKind cell) { return cell == CellKind::lstm || cell == CellKind::gru ? 4 : 1; }  // of cells.h, in layers

// Where direction d of a layer finds its part of the layer's tensors; all but x and the weights are [D, ...] and contiguous.
struct Part {
  int64_t element, state, gates, cells;

  Part(const Shape& shape, int64_t rows, int64_t tokens, int d) {
    const int64_t bytes = shape.dtype == DType::f32 ? 4 : 2;
    element = d * shape.hidden * bytes;  // within a row of out
    state = d * rows * shape.hidden * (shape.state_is_f32 ? 4 : bytes);
    gates = d * tokens * columns(shape.cell) * shape.hidden * bytes;
    cells = d * tokens * shape.hidden * 4;
  }
};

// Masks of direction d, of what fastseq/ops/rnn.py makes of a layer's: three views, [D, B, H], three shares; empty: none.
Noise noise_of(const py::tuple& given, const Shape& shape, int64_t rows, int d) {
  Noise noise;
  if (given.empty()) return noise;
  const int64_t of_direction = d * shape.hidden;  // bools
  noise.any = true;
  noise.update = view(given[0], of_direction), noise.keep_h = view(given[1], of_direction), noise.keep_c = view(given[2], of_direction);
  noise.recurrent = at(given[3].cast<Address>(), d * rows * shape.hidden * (shape.dtype == DType::f32 ? 4 : 2));
  noise.update_scale = given[4].cast<float>(), noise.share_h = given[5].cast<float>(), noise.share_c = given[6].cast<float>();
  return noise;
}

// Addresses of w_ih, w_hh, b_ih, b_hh of direction d among a layer's flat list; 0 where there is none.
struct Weights {
  void* own[4] = {};

  Weights(const py::tuple& flat, int directions, int d) {
    const size_t per = flat.size() / directions;
    for (size_t i = 0; i < per; ++i) own[i] = at(flat[d * per + i].cast<Address>());
  }
};

void forward(int cell, int dtype, bool state_is_f32, int64_t steps, int64_t rows, int64_t tokens, int64_t input, int64_t hidden,
             Address lengths, Address batch_sizes, const py::tuple& x, const py::tuple& out, const py::tuple& weights, int directions,
             Address h0, Address c0, Address h_n, Address c_n, Address gates, Address cells, int threads, const py::tuple& resets,
             const py::tuple& packed, const py::tuple& c_out, const py::tuple& noise) {
  const Shape shape = shape_of(cell, dtype, state_is_f32, input, hidden);
  const View segments = view(resets);
  ForwardPass passes[2];
  for (int d = 0; d < directions; ++d) {
    const Part part(shape, rows, tokens, d);
    const Weights w(weights, directions, d);
    passes[d] = {{d == 1, w.own[0], w.own[1], w.own[2], w.own[3], at(h0, part.state), at(c0, part.state)},
                 view(x),
                 view(out, part.element),
                 at(h_n, part.state),
                 at(c_n, part.state),
                 at(gates, part.gates),
                 static_cast<float*>(at(cells, part.cells)),
                 view(c_out, part.element),
                 noise_of(noise, shape, rows, d)};
    if (!packed.empty()) passes[d].dir.packed = at(packed[d].cast<Address>());
  }
  const py::gil_scoped_release released;
  const SequencePlan order = plan(steps, rows, lengths, batch_sizes);
  kernels(shape.dtype).forward(shape, with_resets(order, segments), passes, directions, threads);
}

void backward(int cell, int dtype, bool state_is_f32, int64_t steps, int64_t rows, int64_t tokens, int64_t input, int64_t hidden,
              Address lengths, Address batch_sizes, const py::tuple& x, const py::tuple& out, const py::tuple& d_out,
              const py::tuple& d_x, const py::tuple& weights, int directions, Address h0, Address c0, Address d_h_n, Address d_c_n,
              Address gates, Address cells, Address d_h0, Address d_c0, const py::tuple& d_weights, int threads,
              const py::tuple& resets, const py::tuple& d_c_out, const py::tuple& noise) {
  const Shape shape = shape_of(cell, dtype, state_is_f32, input, hidden);
  const View segments = view(resets);
  BackwardPass passes[2];
  for (int d = 0; d < directions; ++d) {
    const Part part(shape, rows, tokens, d);
    const Weights w(weights, directions, d), dw(d_weights, directions, d);
    passes[d] = {{d == 1, w.own[0], w.own[1], w.own[2], w.own[3], at(h0, part.state), at(c0, part.state)},
                 view(x),
                 view(out, part.element),
                 view(d_out, part.element),
                 view(d_x),
                 d > 0,
                 at(d_h_n, part.state),
                 at(d_c_n, part.state),
                 at(gates, part.gates),
                 static_cast<const float*>(at(cells, part.cells)),
                 at(d_h0, part.state),
                 at(d_c0, part.state),
                 dw.own[0],
                 dw.own[1],
                 dw.own[2],
                 dw.own[3],
                 view(d_c_out, part.element),
                 noise_of(noise, shape, rows, d)};
  }
  const py::gil_scoped_release released;
  const SequencePlan order = plan(steps, rows, lengths, batch_sizes);
  kernels(shape.dtype).backward(shape, with_resets(order, segments), passes, directions, threads);
}

// Bytes of rnn_pack's result, for one direction.
int64_t packed_bytes(int cell, int dtype, int64_t input, int64_t hidden) {
  return kernels(static_cast<DType>(dtype)).packed_bytes(shape_of(cell, dtype, false, input, hidden));
}

void pack(int cell, int dtype, int64_t input, int64_t hidden, Address w_ih, Address w_hh, Address to, int threads) {
  const Shape shape = shape_of(cell, dtype, false, input, hidden);
  const Direction dir{false, at(w_ih), at(w_hh), nullptr, nullptr, nullptr, nullptr};
  const py::gil_scoped_release released;
  kernels(shape.dtype).pack(shape, dir, at(to), threads);
}

// One step without the tuples of a layer: cells and T=1 layers pay for every argument. `out` 0: the state is the output.
void step(int cell, int dtype, int64_t rows, int64_t input, int64_t hidden, Address x, int64_t x_row, Address w_ih, Address w_hh,
          Address b_ih, Address b_hh, Address h0, Address c0, Address out, Address h_n, Address c_n, Address gates, Address cells,
          int threads, Address packed) {
  const Shape shape = shape_of(cell, dtype, dtype == static_cast<int>(DType::f32), input, hidden);
  const ForwardPass pass{{false, at(w_ih), at(w_hh), at(b_ih), at(b_hh), at(h0), at(c0), at(packed)},
                         {at(x), 0, x_row},
                         {at(out ? out : h_n), 0, hidden},
                         at(h_n),
                         at(c_n),
                         at(gates),
                         static_cast<float*>(at(cells))};
  const py::gil_scoped_release released;
  const SequencePlan order = SequencePlan::padded(1, rows, nullptr);
  kernels(shape.dtype).forward(shape, order.view(), &pass, 1, threads);
}

void step_backward(int cell, int dtype, int64_t rows, int64_t input, int64_t hidden, Address x, int64_t x_row, Address w_ih,
                   Address w_hh, Address b_ih, Address b_hh, Address h0, Address c0, Address d_out, int64_t d_out_row, Address d_h_n,
                   Address d_c_n, Address gates, Address cells, Address d_x, Address d_h0, Address d_c0, Address d_w_ih,
                   Address d_w_hh, Address d_b_ih, Address d_b_hh, int threads) {
  const Shape shape = shape_of(cell, dtype, dtype == static_cast<int>(DType::f32), input, hidden);
  const BackwardPass pass{{false, at(w_ih), at(w_hh), at(b_ih), at(b_hh), at(h0), at(c0)},
                          {at(x), 0, x_row},
                          {nullptr, 0, 0},
                          {at(d_out), 0, d_out_row},
                          {at(d_x), 0, input},
                          false,
                          at(d_h_n),
                          at(d_c_n),
                          at(gates),
                          static_cast<const float*>(at(cells)),
                          at(d_h0),
                          at(d_c0),
                          at(d_w_ih),
                          at(d_w_hh),
                          at(d_b_ih),
                          at(d_b_hh)};
  const py::gil_scoped_release released;
  const SequencePlan order = SequencePlan::padded(1, rows, nullptr);
  kernels(shape.dtype).backward(shape, order.view(), &pass, 1, threads);
}

// A dict of numbers and addresses by name, as fastseq/ops/decoder_native.py writes it; a name that is missing raises KeyError.
struct Named {
  const py::dict& values;

  int64_t number(const char* name) const { return values[name].cast<int64_t>(); }
  template <class E = void>
  E* address(const char* name) const {
    return static_cast<E*>(at(values[name].cast<Address>()));
  }
};

DecoderCell decoder_cell(const Named& in, bool backward) {
  DecoderCell cell{in.address("w_ih"), in.number("pitch_ih"), in.address("w_hh"), in.address("b_ih"), in.address("b_hh"),
                   in.number("below") != 0, in.number("feed") != 0, in.number("context") != 0, in.address("h0"), in.address("c0"),
                   in.address("h_n"), in.address("c_n"), nullptr, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (!backward) return cell;
  cell.d_hs = in.address("d_hs"), cell.d_hs_row = in.number("d_hs_row"), cell.d_hs_step = in.number("d_hs_step");
  cell.d_h_n = in.address("d_h_n"), cell.d_c_n = in.address("d_c_n"), cell.d_gates = in.address("d_gates");
  cell.d_h0 = in.address("d_h0"), cell.d_c0 = in.address("d_c0");
  return cell;
}

Decoder decoder_of(const py::dict& sizes, const py::dict& tensors, const py::list& cells, bool backward) {
  const Named size{sizes}, tensor{tensors};
  Decoder d{};
  d.cell = static_cast<CellKind>(size.number("cell")), d.dtype = static_cast<DType>(size.number("dtype"));
  d.state_is_f32 = size.number("state_is_f32") != 0;
  d.rows = size.number("rows"), d.copies = size.number("copies"), d.steps = size.number("steps"), d.source = size.number("source");
  d.units = size.number("units"), d.features = size.number("features"), d.hidden = size.number("hidden"), d.output = size.number("output");
  d.attend = static_cast<Attend>(size.number("attend")), d.query_cell = static_cast<int>(size.number("query_cell"));
  d.feed = static_cast<Feed>(size.number("feed")), d.combine = static_cast<Combine>(size.number("combine"));
  d.additive = size.number("additive") != 0, d.keep = size.number("keep") != 0;
  if (cells.size() > static_cast<size_t>(kMaxCells)) throw std::length_error("more cells than kMaxCells");
  for (const py::handle& cell : cells) d.of[d.cells++] = decoder_cell(Named{py::cast<py::dict>(cell)}, backward);
  d.keys = tensor.address("keys"), d.memory = tensor.address("memory"), d.mask = tensor.address<bool>("mask");
  d.w_q = tensor.address("w_q"), d.v = tensor.address("v"), d.beside = tensor.address("beside"), d.feed0 = tensor.address("feed0");
  d.w_r = tensor.address("w_r"), d.b_r = tensor.address("b_r"), d.r_pitch = tensor.number("w_r_pitch");
  d.r_state = tensor.number("r_state"), d.r_previous = tensor.number("r_prev"), d.r_context = tensor.number("r_context");
  d.layer_masks = tensor.address("layer_masks"), d.read_mask = tensor.address("read_mask"), d.out_mask = tensor.address("out_mask");
  d.hs = tensor.address("hs"), d.contexts = tensor.address("contexts"), d.outs = tensor.address("outs");
  d.weights = tensor.address("weights"), d.gates = tensor.address("gates"), d.cs = tensor.address<float>("cs");
  d.queries = tensor.address("queries"), d.read_saved = tensor.address("read_saved");
  if (!backward) {
    d.memory_gates = tensor.address("memory_gates"), d.projected = tensor.address("projected");
    d.projected_pitch = tensor.number("projected_pitch"), d.read_input = tensor.address("read_input"), d.feed_n = tensor.address("feed_n");
    return d;
  }
  d.d_contexts = tensor.address("d_contexts"), d.d_outs = tensor.address("d_outs"), d.d_weights = tensor.address("d_weights");
  d.d_feed_n = tensor.address("d_feed_n"), d.d_queries = tensor.address("d_queries"), d.d_read = tensor.address("d_read");
  d.d_feed0 = tensor.address("d_feed0"), d.d_keys = tensor.address<float>("d_keys");
  d.d_memory = tensor.address<float>("d_memory"), d.d_v = tensor.address<float>("d_v");
  d.d_scores = tensor.address<float>("d_scores");
  return d;
}

void run_decoder_forward(const py::dict& sizes, const py::dict& tensors, const py::list& cells) {
  const Decoder decoder = decoder_of(sizes, tensors, cells, false);
  const int threads = sizes["threads"].cast<int>();
  const py::gil_scoped_release released;
  kernels(decoder.dtype).decoder_forward(decoder, threads);
}

// `found`: numbers and addresses of a Search. Whether a logit was NaN.
bool run_decoder_search(const py::dict& sizes, const py::dict& tensors, const py::list& cells, const py::dict& found) {
  const Named in{found};
  int wrong = 0;
  Search search{};
  search.vocabulary = in.number("vocabulary"), search.inputs = in.number("inputs"), search.returned = in.number("returned");
  search.forced = in.number("forced"), search.fewest = in.number("fewest"), search.eos = in.number("eos"), search.pad = in.number("pad");
  search.stopping = static_cast<Stopping>(in.number("stopping")), search.rewards_length = in.number("rewards_length") != 0;
  search.embedding = in.address("embedding"), search.w_out = in.address("w_out"), search.b_out = in.address("b_out");
  search.context = in.address("context"), search.r_input = in.number("r_input");
  search.prefix = in.address<int64_t>("prefix"), search.norms = in.address<float>("norms");
  search.tokens = in.address<int64_t>("tokens"), search.trail = in.address<int64_t>("trail");
  search.lengths = in.address<int64_t>("lengths"), search.scores = in.address<float>("scores"), search.wrong = &wrong;
  Decoder decoder = decoder_of(sizes, tensors, cells, false);
  decoder.search = &search;
  const int threads = sizes["threads"].cast<int>();
  {
    const py::gil_scoped_release released;
    kernels(decoder.dtype).decoder_forward(decoder, threads);
  }
  return wrong != 0;
}

void run_decoder_backward(const py::dict& sizes, const py::dict& tensors, const py::list& cells) {
  const Decoder decoder = decoder_of(sizes, tensors, cells, true);
  const int threads = sizes["threads"].cast<int>();
  const py::gil_scoped_release released;
  kernels(decoder.dtype).decoder_backward(decoder, threads);
}

Tokens tokens(const py::tuple& v) {  // (address, inner size, outer stride, inner stride), strides in elements
  return {at(v[0].cast<Address>()), v[1].cast<int64_t>(), v[2].cast<int64_t>(), v[3].cast<int64_t>()};
}

template <void (*Kernels::*Function)(const Product&, int)>
void multiply(int dtype, int64_t count, int64_t depth, int64_t columns, const py::tuple& x, const py::tuple& out, Address w,
              int64_t pitch, Address bias, bool add, int threads) {
  const Product of{static_cast<DType>(dtype), count, depth, columns, tokens(x), tokens(out), at(w), pitch, at(bias), add};
  const py::gil_scoped_release released;
  (kernels(of.dtype).*Function)(of, threads);
}

void weight_gradient(int dtype, int64_t count, int64_t rows, int64_t columns, const py::tuple& dy, const py::tuple& x, Address d_w,
                     int64_t pitch, Address d_b, int threads) {
  const WeightGradient of{static_cast<DType>(dtype), count, rows, columns, tokens(dy), tokens(x), at(d_w), pitch, at(d_b)};
  const py::gil_scoped_release released;
  kernels(of.dtype).weight_gradient(of, threads);
}

Shape norm_shape(const Named& size) {
  return shape_of(static_cast<int>(size.number("cell")), static_cast<int>(size.number("dtype")), size.number("state_is_f32") != 0, 0,
                  size.number("hidden"));
}

// What both passes of a layer-normalised direction have; sizes, tensors and views by name, as fastseq/ops/rnn_norm.py writes them.
NormPass norm_pass(const Named& size, const Named& tensor, const py::dict& views, const py::tuple& noise) {
  return {size.number("reverse") != 0, tensor.address("w_hh"), tensor.address("gain"), tensor.address("bias"), tensor.address("gain_x"),
          tensor.address("bias_x"), tensor.address("cell_gain"), tensor.address("cell_bias"), tensor.address("h0"), tensor.address("c0"), view(views["inputs"]), view(views["out"]),
          noise_of(noise, norm_shape(size), size.number("rows"), 0)};
}

template <class Pass>
void run_norm(void (*Kernels::*function)(const Shape&, const Sequence&, const Pass&, int), const Named& size, const Named& tensor,
              const View& resets, const Pass& pass) {
  const Shape shape = norm_shape(size);
  const int64_t steps = size.number("steps"), rows = size.number("rows");
  const auto lengths = reinterpret_cast<Address>(tensor.address("lengths")), sizes = reinterpret_cast<Address>(tensor.address("batch_sizes"));
  const int threads = static_cast<int>(size.number("threads"));
  const py::gil_scoped_release released;
  const SequencePlan order = plan(steps, rows, lengths, sizes);
  (kernels(shape.dtype).*function)(shape, with_resets(order, resets), pass, threads);
}

void norm_forward(const py::dict& sizes, const py::dict& tensors, const py::dict& views, const py::tuple& noise) {
  const Named size{sizes}, tensor{tensors};
  const NormForwardPass pass{norm_pass(size, tensor, views, noise), tensor.address("h_n"), tensor.address("c_n"), tensor.address("gates"),
                             tensor.address("hats"), tensor.address<float>("cells"), tensor.address<float>("stats"),
                             view(views["c_out"])};
  run_norm(&Kernels::norm_forward, size, tensor, view(views["resets"]), pass);
}

void norm_backward(const py::dict& sizes, const py::dict& tensors, const py::dict& views, const py::tuple& noise) {
  const Named size{sizes}, tensor{tensors};
  const NormBackwardPass pass{norm_pass(size, tensor, views, noise), tensor.address("gates"), tensor.address("hats"), tensor.address<float>("cells"),
                              tensor.address<float>("stats"), view(views["d_out"]), tensor.address("d_h_n"), tensor.address("d_c_n"),
                              view(views["d_inputs"]), tensor.address("d_products"), tensor.address("before"), tensor.address("d_h0"),
                              tensor.address("d_c0"), tensor.address<float>("d_sums"), view(views["d_c_out"])};
  run_norm(&Kernels::norm_backward, size, tensor, view(views["resets"]), pass);
}

// sizes: memory rows, queries of each, source positions, units, features
AttentionPass attention_pass(int dtype, const py::tuple& sizes, Address q, Address keys, Address memory, Address mask, Address v) {
  const auto size = [&](int i) { return sizes[i].cast<int64_t>(); };
  return {static_cast<DType>(dtype), size(0), size(1), size(2), size(3), size(4), at(q), at(keys), at(memory),
          static_cast<const bool*>(at(mask)), at(v)};
}

void attention_forward(int dtype, const py::tuple& sizes, Address q, Address keys, Address memory, Address mask, Address v,
                       Address context, Address weights, int threads) {
  const AttentionForward pass{attention_pass(dtype, sizes, q, keys, memory, mask, v), at(context), at(weights)};
  const py::gil_scoped_release released;
  kernels(pass.dtype).attention_forward(pass, threads);
}

void attention_backward(int dtype, const py::tuple& sizes, Address q, Address keys, Address memory, Address mask, Address v,
                        Address weights, Address d_context, Address d_weights, Address d_q, Address d_keys, Address d_memory,
                        Address d_v, int threads) {
  const AttentionBackward pass{attention_pass(dtype, sizes, q, keys, memory, mask, v),
                               at(weights),
                               at(d_context),
                               at(d_weights),
                               at(d_q),
                               at(d_keys),
                               at(d_memory),
                               at(d_v)};
  const py::gil_scoped_release released;
  kernels(pass.dtype).attention_backward(pass, threads);
}

py::dict features() {
  py::dict result;
  for (const auto& [name, present] : cpu_features()) result[name] = present;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of fastseq: raw addresses in, nothing checked here. Use fastseq.functional.";
  m.def("choose_isa", &choose_isa, "Use this ISA variant; '' chooses the fastest that the CPU has.");
  m.def("isa", &isa);
  m.def("isa_available", &available_isas);
  m.def("cpu_features", &features);
  m.def("rnn_forward", &forward);
  m.def("rnn_backward", &backward);
  m.def("rnn_step", &step);
  m.def("rnn_packed_bytes", &packed_bytes);
  m.attr("PACKED_PRODUCTS") = kPackedProducts;
  m.def("rnn_pack", &pack);
  m.def("rnn_step_backward", &step_backward);
  m.def("random_flags", [](uint64_t seed, int64_t count, uint32_t bound, Address to, int threads) {
    const py::gil_scoped_release released;
    kernels(DType::f32).random_flags({seed, count, bound, static_cast<uint8_t*>(at(to))}, threads);
  });
  m.def("rnn_norm_forward", &norm_forward);
  m.def("rnn_norm_backward", &norm_backward);
  m.def("discard", [](Address memory, int64_t bytes) { discard(at(memory), bytes); });
  m.def("decoder_forward", &run_decoder_forward);
  m.def("decoder_backward", &run_decoder_backward);
  m.def("decoder_search", &run_decoder_search);
  m.def("product", &multiply<&Kernels::product>);
  m.def("input_gradient", &multiply<&Kernels::input_gradient>);
  m.def("weight_gradient", &weight_gradient);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("poison_scratch", &poison_scratch, "For tests: fill this thread's kept scratch memory with NaN.");
  m.def(
      "tile_rate", [](int dtype, int64_t repeats) {
        return kernels(static_cast<DType>(dtype)).tile_rate(static_cast<DType>(dtype), repeats);
      },
      py::call_guard<py::gil_scoped_release>(),
      "FLOP/s of the register tile on operands in the first-level cache: dtype 0 fp32, 1 bf16.");
  m.def(
      "load_rate",
      [](int64_t bytes, int64_t repeats, int threads) {
        return kernels(DType::f32).load_rate(bytes, repeats, usable_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>(), "Bytes/s of loads by all threads, each from a buffer of so many bytes, read again and again.");
  m.def(
      "barrier_seconds", [](int threads, int64_t repeats) { return barrier_seconds(usable_threads(threads), repeats); },
      py::call_guard<py::gil_scoped_release>(), "Of one wait of so many threads for each other.");
}

}  // namespace fastseq
