// The Python module nanogpt_fast._C: functions take addresses and numbers, and write results to addresses. It doesn't depend on torch; its
// callers in ops/ check the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "amx/attention.h"
#include "amx/gemm.h"
#include "decode/decode.h"
#include "hopper/attention_backward.h"
#include "hopper/linear_act.h"
#include "isa.h"
#include "rows/adamw.h"
#include "rows/attention.h"
#include "rows/cross_entropy.h"
#include "rows/layer_norm.h"
#include "sampler/sampler.h"

namespace py = pybind11;
using ngf::Batch;

#ifndef NGF_VERSION  // setup.py defines all of these
#define NGF_VERSION "unknown"
#endif
#ifndef NGF_CUDA_VERSION
#define NGF_CUDA_VERSION ""
#endif
#ifndef NGF_CUDA_ARCHS
#define NGF_CUDA_ARCHS ""
#endif
#ifndef NGF_CUDA_WHY_NOT
#define NGF_CUDA_WHY_NOT ""
#endif

namespace {

Batch make_batch(uintptr_t logits, const std::string& type, int64_t rows, int64_t vocab, int64_t row_stride, uintptr_t temperature_rows,
                 float temperature, uintptr_t top_k_rows, int64_t top_k, uintptr_t top_p_rows, float top_p, uintptr_t min_p_rows,
                 float min_p, uintptr_t seed, uintptr_t offset, uintptr_t token) {
  Batch batch;
  batch.logits = (const void*)logits;
  if (type == "float32") batch.type = ngf::LogitType::fp32;
  else if (type == "bfloat16") batch.type = ngf::LogitType::bf16;
  else if (type == "float16") batch.type = ngf::LogitType::fp16;
  else throw std::invalid_argument("type is '" + type + "'; expected float32, bfloat16 or float16");
  if (rows < 0 || rows > INT32_MAX) throw std::invalid_argument("rows is " + std::to_string(rows) + "; expected 0 to 2^31 - 1");
  if (vocab < 1 || vocab > ngf::MAX_VOCAB)
    throw std::invalid_argument("vocab is " + std::to_string(vocab) + "; expected 1 to " + std::to_string(ngf::MAX_VOCAB));
  if (rows > 0 && !(logits && seed && offset && token)) throw std::invalid_argument("logits, seed, offset and token must not be null");
  batch.rows = rows;
  batch.vocab = vocab;
  batch.row_stride = row_stride;
  batch.temperature = {(const float*)temperature_rows, temperature};
  batch.top_k = {(const int64_t*)top_k_rows, top_k};
  batch.top_p = {(const float*)top_p_rows, top_p};
  batch.min_p = {(const float*)min_p_rows, min_p};
  batch.seed = (const int64_t*)seed;
  batch.offset = (int64_t*)offset;
  batch.token = (int64_t*)token;
  return batch;
}

// A model as addresses of its weights, which the caller keeps alive and in place.
struct Decoder {
  ngf::Model model;
  std::vector<ngf::LayerWeights> layers;

  Decoder(int64_t rows, int64_t width, int64_t heads, int64_t context, int64_t vocab, const std::string& type, const std::string& activation,
          uintptr_t wte, uintptr_t wpe, std::array<uintptr_t, 2> ln_f, std::array<uintptr_t, 2> head,
          const std::vector<std::array<uintptr_t, 14>>& pointers) {
    if (type != "float32" && type != "bfloat16") throw std::invalid_argument("type is '" + type + "'; expected float32 or bfloat16");
    if (activation != "gelu" && activation != "gelu_tanh")
      throw std::invalid_argument("activation is '" + activation + "'; expected gelu or gelu_tanh");
    if (width < 1 || heads < 1 || width % heads || context < 1 || vocab < 1)
      throw std::invalid_argument("width is " + std::to_string(width) + ", heads " + std::to_string(heads) + ", context " + std::to_string(context) +
                                  ", vocab " + std::to_string(vocab) + "; expected positive numbers, and width a multiple of heads");
    for (const auto& p : pointers)
      layers.push_back({norm(p[0], p[1]), norm(p[2], p[3]), linear(p[4], p[5]), linear(p[6], p[7]), linear(p[8], p[9]), linear(p[10], p[11]),
                        (void*)p[12], (void*)p[13]});
    model = {rows, width, heads, context, vocab, type == "float32" ? ngf::WeightType::fp32 : ngf::WeightType::bf16,
             activation == "gelu" ? ngf::Activation::gelu : ngf::Activation::gelu_tanh, (const float*)wte, (const float*)wpe,
             norm(ln_f[0], ln_f[1]), linear(head[0], head[1]), layers.data(), (int64_t)layers.size()};
  }
  static ngf::NormWeights norm(uintptr_t weight, uintptr_t bias) { return {(const float*)weight, (const float*)bias}; }
  static ngf::LinearWeights linear(uintptr_t weight, uintptr_t bias) { return {(const void*)weight, (const void*)bias}; }
};

}  // namespace

// The arguments that describe a batch, the same for both samplers.
#define NGF_BATCH_PARAMETERS                                                                                                       \
  uintptr_t logits, const std::string &type, int64_t rows, int64_t vocab, int64_t row_stride, uintptr_t temperature_rows,          \
      float temperature, uintptr_t top_k_rows, int64_t top_k, uintptr_t top_p_rows, float top_p, uintptr_t min_p_rows, float min_p, \
      uintptr_t seed, uintptr_t offset, uintptr_t token
#define NGF_BATCH_ARGUMENTS                                                                                                     \
  logits, type, rows, vocab, row_stride, temperature_rows, temperature, top_k_rows, top_k, top_p_rows, top_p, min_p_rows, min_p, \
      seed, offset, token

PYBIND11_MODULE(_C, module) {
  module.doc() = "The sampler in C++ and CUDA; decoding and parts of training on the CPU, and of training on Hopper. Pointers are addresses; those of one call "
                 "are in one memory (host, or one GPU).";
  module.attr("__version__") = NGF_VERSION;

  module.def("build_info", [] {
    py::dict info;
    info["version"] = NGF_VERSION;
    info["compiler"] = NGF_COMPILER;
    info["cpu_isas"] = ngf::cpu_isas();
    info["decode_isas"] = ngf::decode_isas();
#ifdef NGF_CUDA
    info["cuda"] = NGF_CUDA_VERSION;
#else
    info["cuda"] = py::none();
#endif
    info["cuda_archs"] = NGF_CUDA_ARCHS;
    info["cuda_why_not"] = NGF_CUDA_WHY_NOT;
    return info;
  }, "This build: version, compiler, the cpu_isas and decode_isas that run here (best first), cuda (None without nvcc), cuda_archs, cuda_why_not.");

  module.def("sample_cpu", [](NGF_BATCH_PARAMETERS, int threads, const std::string& isa) {
    const Batch batch = make_batch(NGF_BATCH_ARGUMENTS);
    py::gil_scoped_release others_may_run;
    ngf::sample_cpu(batch, threads, isa.c_str());
  }, "Draw one token per row into `token`. `*_rows` are addresses of one value per row, or 0 for the value beside them.");

  py::class_<Batch>(module, "Batch", "The arguments of sample_cpu, checked once: a draw is then one call with one argument. Tensors must stay in place.")
      .def(py::init(&make_batch), py::arg("logits"), py::arg("type"), py::arg("rows"), py::arg("vocab"), py::arg("row_stride"),
           py::arg("temperature_rows"), py::arg("temperature"), py::arg("top_k_rows"), py::arg("top_k"), py::arg("top_p_rows"),
           py::arg("top_p"), py::arg("min_p_rows"), py::arg("min_p"), py::arg("seed"), py::arg("offset"), py::arg("token"))
      .def("sample_cpu", [](const Batch& batch, int threads) {
        py::gil_scoped_release others_may_run;
        ngf::sample_cpu(batch, threads, "");
      }, "Draw one token per row.");

  py::class_<Decoder>(module, "Decoder", "A GPT on the CPU, one token per row: see csrc/decode/decode.h. Weights must stay in place.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, const std::string&, const std::string&, uintptr_t, uintptr_t,
                    std::array<uintptr_t, 2>, std::array<uintptr_t, 2>, const std::vector<std::array<uintptr_t, 14>>&>(),
           py::arg("rows"), py::arg("width"), py::arg("heads"), py::arg("context"), py::arg("vocab"), py::arg("type"), py::arg("activation"),
           py::arg("wte"), py::arg("wpe"), py::arg("ln_f"), py::arg("head"), py::arg("layers"))
      .def("step", [](const Decoder& self, uintptr_t token, uintptr_t position, uintptr_t logits, int threads, const std::string& isa) {
        py::gil_scoped_release others_may_run;
        ngf::decode_cpu(self.model, (const int64_t*)token, (const int64_t*)position, (float*)logits, threads, isa.c_str());
      }, "Process `token` at `position` in every row; logits (rows, vocab) fp32.");

  module.def("count_targets", [](uintptr_t targets, int64_t rows, int64_t vocab, int64_t ignore_index) {
    return ngf::count_targets((const int64_t*)targets, rows, vocab, ignore_index);
  }, "The number of targets that are not ignored. IndexError for one outside of the vocabulary.");
  module.def("cross_entropy_cpu", [](uintptr_t logits, uintptr_t dlogits, const std::string& type, int64_t rows, int64_t vocab, int64_t row_stride,
                                     int64_t gradient_stride, uintptr_t targets, int64_t ignore_index, uintptr_t losses, int threads,
                                     const std::string& isa) {
    if (type != "float32" && type != "bfloat16") throw std::invalid_argument("type is '" + type + "'; expected float32 or bfloat16");
    const ngf::LossRows batch{(const void*)logits, (void*)dlogits, type == "bfloat16", rows, vocab, row_stride, gradient_stride,
                              (const int64_t*)targets, ignore_index, (float*)losses};
    py::gil_scoped_release others_may_run;
    ngf::cross_entropy_cpu(batch, threads, isa.c_str());
  }, "Losses and gradients of rows of logits: see csrc/rows/cross_entropy.h. dlogits and losses may be 0.");
  module.def("attention_gradient_cpu", [](int64_t heads, int64_t rows, int64_t keys, int64_t first, float scale, uintptr_t scores,
                                          uintptr_t lse, int64_t lse_stride, uintptr_t dp, uintptr_t p, uintptr_t ds, int threads,
                                          const std::string& isa) {
    const ngf::AttentionGradient batch{heads, rows, keys, first, scale, (float*)scores, (const float*)lse, lse_stride, (const float*)dp,
                                       (uint16_t*)p, (uint16_t*)ds};
    py::gil_scoped_release others_may_run;
    ngf::attention_gradient_cpu(batch, threads, isa.c_str());
  }, "Attention's weights and the gradient of its scores: see csrc/rows/attention.h.");

  module.def("layer_norm_forward_cpu", [](std::array<bool, 3> bf16, int64_t rows, int64_t width, uintptr_t x, uintptr_t branch, uintptr_t weight,
                                          uintptr_t bias, float eps, uintptr_t s, uintptr_t y, uintptr_t mean, uintptr_t rstd, int threads,
                                          const std::string& isa) {
    const ngf::LayerNormForward batch{{bf16[0], bf16[1], bf16[2]}, rows, width, (const void*)x, (const void*)branch, (const float*)weight,
                                      (const float*)bias, eps, (void*)s, (void*)y, (float*)mean, (float*)rstd};
    py::gil_scoped_release others_may_run;
    ngf::layer_norm_forward_cpu(batch, threads, isa.c_str());
  }, "Residual add and LayerNorm: see csrc/rows/layer_norm.h. bf16: of x, branch and y. branch and bias may be 0.");
  module.def("layer_norm_backward_cpu", [](std::array<bool, 3> bf16, int64_t rows, int64_t width, uintptr_t dy, uintptr_t ds, uintptr_t s,
                                           uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dbranch, uintptr_t dweight,
                                           uintptr_t dbias, int threads, const std::string& isa) {
    const ngf::LayerNormBackward batch{{bf16[0], bf16[1], bf16[2]}, rows, width, (const void*)dy, (const void*)ds, (const void*)s,
                                       (const float*)weight, (const float*)mean, (const float*)rstd, (void*)dx, (void*)dbranch,
                                       (float*)dweight, (float*)dbias};
    py::gil_scoped_release others_may_run;
    ngf::layer_norm_backward_cpu(batch, threads, isa.c_str());
  }, "Its gradient. ds and dbranch may be 0.");

  module.def("gradient_squares_cpu", [](const std::vector<uintptr_t>& gradients, const std::vector<int64_t>& sizes, int threads,
                                        const std::string& isa) {
    if (gradients.size() != sizes.size()) throw std::invalid_argument("gradients and sizes differ in length");
    py::gil_scoped_release others_may_run;
    return ngf::gradient_squares_cpu((const float* const*)gradients.data(), sizes.data(), (int64_t)sizes.size(), threads, isa.c_str());
  }, "The sum of squares of fp32 gradients: see csrc/rows/adamw.h.");
  module.def("adamw_cpu", [](const std::vector<std::pair<std::array<double, 5>, std::vector<std::array<uintptr_t, 7>>>>& groups, double factor,
                             int threads, const std::string& isa) {
    std::vector<ngf::AdamTensor> tensors;
    for (const auto& [o, pointers] : groups)
      for (const auto& p : pointers)
        tensors.push_back({(float*)p[0], (const float*)p[1], (float*)p[2], (float*)p[3], (float*)p[4], (uint16_t*)p[5], (int64_t)p[6], o[0],
                           o[1], o[2], o[3], o[4]});
    py::gil_scoped_release others_may_run;
    ngf::adamw_cpu(tensors.data(), (int64_t)tensors.size(), (float)factor, threads, isa.c_str());
  }, "AdamW's step: see csrc/rows/adamw.h. groups: [((lr, beta1, beta2, eps, weight_decay), "
     "[(weight, gradient, exp_avg, exp_avg_sq, step, bf16 copy or 0, elements)])].");

  module.def("attention_forward_amx", [](uintptr_t qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t width, float scale, uintptr_t lse,
                                         uintptr_t out, int threads) {
    py::gil_scoped_release others_may_run;
    ngf::attention_forward_amx({(const uint16_t*)qkv, batch, tokens, heads, width, scale, (float*)lse}, (uint16_t*)out, threads);
  }, "Causal attention in bf16 on AMX tiles: see csrc/amx/attention.h.");
  module.def("attention_backward_amx", [](uintptr_t qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t width, float scale, uintptr_t lse,
                                          uintptr_t dout, uintptr_t dqkv, int threads) {
    py::gil_scoped_release others_may_run;
    ngf::attention_backward_amx({(const uint16_t*)qkv, batch, tokens, heads, width, scale, (float*)lse}, (const uint16_t*)dout, (uint16_t*)dqkv,
                                threads);
  }, "Its gradient.");

  module.def("gemm_works", &ngf::gemm_works, "Whether this CPU and build have AMX, which linear_cpu and weight_gradient_cpu need.");
  module.def("linear_cpu", [](uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, bool w_by_input, uintptr_t bias, int64_t rows,
                              int64_t inputs, int64_t outputs, uintptr_t y, int threads) {
    py::gil_scoped_release others_may_run;
    ngf::linear_cpu({(const uint16_t*)x, (const uint16_t*)w, x_stride, w_stride, w_by_input, (const float*)bias, rows, inputs, outputs,
                     (uint16_t*)y}, threads);
  }, "y = x W^T + b in bf16 on AMX tiles: see csrc/amx/gemm.h.");
  module.def("product_fp32", [](uintptr_t a, int64_t a_row, int64_t a_column, uintptr_t b, int64_t b_row, int64_t b_column, uintptr_t bias,
                                int64_t rows, int64_t depth, int64_t columns, uintptr_t c, int threads) {
    py::gil_scoped_release others_may_run;
    ngf::product_fp32({(const float*)a, (const float*)b, a_row, a_column, b_row, b_column, (const float*)bias, rows, depth, columns, (float*)c},
                      threads);
  }, "c (rows, columns) = a (rows, depth) b (depth, columns) + bias in fp32; a and b with one stride of 1 each. bias (columns,) or 0.");

  module.def("weight_gradient_cpu", [](uintptr_t dy, uintptr_t x, int64_t dy_stride, int64_t x_stride, int64_t rows, int64_t outputs, int64_t inputs,
                                       uintptr_t dw, bool dw_bf16, int threads) {
    py::gil_scoped_release others_may_run;
    ngf::weight_gradient_cpu({(const uint16_t*)dy, (const uint16_t*)x, dy_stride, x_stride, rows, outputs, inputs, (void*)dw, dw_bf16}, threads);
  }, "dW = dy^T x in bf16 on AMX tiles: see csrc/amx/gemm.h.");

#ifdef NGF_CUDA
  module.def("sample_cuda", [](NGF_BATCH_PARAMETERS, int device, uintptr_t stream) {
    const Batch batch = make_batch(NGF_BATCH_ARGUMENTS);
    py::gil_scoped_release others_may_run;
    ngf::sample_cuda(batch, device, (void*)stream);
  }, "sample_cpu's draw as one launch on a CUDA stream.");
#ifdef NGF_SM90
  module.def("linear_act_sm90", [](bool bf16, bool tanh, bool backward, uintptr_t a, int64_t a_stride, uintptr_t b, uintptr_t h, uintptr_t out,
                                   uintptr_t bias, uintptr_t column_sums, int M, int N, int K, int device, uintptr_t stream) {
    py::gil_scoped_release others_may_run;
    ngf::linear_act_sm90({bf16, tanh, backward, (const void*)a, a_stride, (const void*)b, (void*)h, (void*)out, (const float*)bias,
                          (float*)column_sums, M, N, K}, device, (void*)stream);
  }, "The GELU-MLP's matmul with its activation, as one launch on a CUDA stream: see csrc/hopper/linear_act.h.");
  // A tensor of heads: its address, and the strides of batch, heads and tokens.
  using Heads = std::array<int64_t, 4>;
  module.def("attention_backward_heads_sm90", [](bool bf16, const Heads& q, const Heads& k, const Heads& v, const Heads& grad, const Heads& out, uintptr_t lse,
                                           const Heads& dq, const Heads& dk, const Heads& dv, uintptr_t terms, uintptr_t taken, int B, int H, int T,
                                           double scale, int device, uintptr_t stream) {
    py::gil_scoped_release others_may_run;
    const auto heads = [](const Heads& x) { return ngf::Heads{(void*)x[0], x[1], x[2], x[3]}; };
    ngf::attention_backward_sm90({bf16, heads(q), heads(k), heads(v), heads(grad), heads(out), (const float*)lse, heads(dq), heads(dk), heads(dv),
                                  (float*)terms, (int*)taken, B, H, T, (float)scale, (float)(scale * 1.4426950408889634)},
                                 device, (void*)stream);
  }, "The backward of causal attention, on a CUDA stream: see csrc/hopper/attention_backward.h.");
#endif
  module.def("cuda_why_not", [](int device) { return std::string(ngf::cuda_why_not(device)); },
             "Why the launch cannot work on this device, or ''.");
#else
  module.def("cuda_why_not", [](int) { return std::string("the extension was built without CUDA: ") + NGF_CUDA_WHY_NOT; },
             "Why the launch cannot work on this device, or ''.");
#endif
}
