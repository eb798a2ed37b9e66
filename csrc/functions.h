// The functions of the extension that take and return tensors. module.cpp gives them to Python. What they do is said
// where they are defined; pybind11, which takes seconds to compile, is not seen there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace fastkd {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

std::optional<std::pair<Tensor, Tensor>> unit_rows_of(const Tensors& sides, double shortest, double longest);

std::tuple<Tensor, Tensor, Tensors> dense_contrast(
    const Tensor& q, const Optional& keys, const Tensor& scale, const Optional& query_labels,
    const Optional& key_labels, const Optional& positive_index, bool by_label, bool exclude_self, bool is_bounded,
    const Optional& weight, double factor, const Optional& inverse_q, const Optional& inverse_k,
    const std::vector<bool>& needs, int64_t min_linear);

std::tuple<Tensor, Tensor, Tensor, Tensors> dense_dual_softmax(
    const Tensor& units, const Optional& inverse_norm, const Tensor& scale, const Optional& weight,
    std::pair<double, double> factors, bool is_swapped, const std::vector<bool>& needs, int64_t min_linear);

std::tuple<Tensor, Tensor, Tensors> dense_soft_target(
    const Tensor& student_logits, const Tensor& teacher_logits, const Optional& labels, const Optional& weight,
    double temperature, double label_smoothing, double factor, bool needs_grad);

std::pair<Tensor, Tensor> soft_target_rows(const Tensor& student_logits, const Tensor& teacher_logits,
                                           const Optional& labels, const Tensor& student_scale,
                                           const Tensor& teacher_scale, bool exclude_label, std::optional<double> eps,
                                           bool moments);

Tensor soft_target_rows_gradient(const Tensor& student_logits, const Tensor& teacher_logits, const Optional& labels,
                                 const Tensor& student_scale, const Tensor& teacher_scale, const Tensor& kept,
                                 const Tensor& upstream, bool exclude_label, std::optional<double> eps);

void pair_sums(const Tensor& X, const Tensor& Y, const Tensor& p, const Tensor& weighted, const Tensor& q,
               int64_t first_row, int64_t first_column);

void pair_gradients(const Tensor& X, const Tensor& Y, const Tensor& G, const Tensor& mirrored, const Tensor& r,
                    const Tensor& x, const Tensor& k, const Tensor& k_of_d, int64_t first_row, int64_t first_column);

void tile_sums(const Tensor& S, const Tensor& Y, const Tensor& of_rows, int64_t first_row, int64_t first_column);

void tile_gradient(const Tensor& S, const Tensor& Y, const Tensor& factors, int64_t first_row, int64_t first_column);

std::tuple<Tensor, Tensor, Tensor, Tensor> triplet_angles(const Tensor& gram_s, const Tensor& inverse_s,
                                                          const Tensor& gram_t, const Tensor& inverse_t, int64_t first,
                                                          int64_t last, int64_t threads);

}  // namespace fastkd
