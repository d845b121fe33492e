// weighted_kmeans_assign, weighted_kmeans_update: the operators; what they compute, shapes, source and kernels stand in
// weighted_kmeans.cuh.
#include "csrc/cuda/weighted_kmeans.cuh"

#include <tuple>

#include "csrc/cuda/tokens_launch.cuh"

namespace qm_spec {
namespace {

std::tuple<Tensor, Tensor> assign_cuda(Tensor points, Tensor centres, Tensor mask, Tensor live) {
  constexpr char kOp[] = "weighted_kmeans_assign";
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  points = torch::stable::contiguous(points);
  centres = beside(centres, points, kOp, "centres");
  mask = beside(mask, points, kOp, "mask");
  live = beside(live, points, kOp, "live");
  // The kernel compares slots as float32.
  STD_TORCH_CHECK(centres.size(1) < (1 << 24), kOp, ": at most 2^24 - 1 slots, got ", centres.size(1));
  Tensor cluster = torch::stable::new_empty(points, {points.size(0), points.size(1)}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(points, {points.size(0), points.size(1)}, ScalarType::Float);
  Tensor norms = torch::stable::new_empty(centres, {centres.size(0), centres.size(1)});
  const Launcher launch(points.get_device_index());
  dispatch_tokens(points, kOp, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    weighted_kmeans_assign(
        launch, Assign<T>{sequences<T>(points), sequences<float>(centres), data<const float>(norms),
                          data<const bool>(mask), data<const bool>(live), data<int64_t>(cluster),
                          data<float>(distance)},
        data<float>(norms));
  });
  return {cluster, distance};
}

std::tuple<Tensor, Tensor> update_cuda(Tensor points, Tensor mass, Tensor cluster, Tensor distance, Tensor live) {
  constexpr char kOp[] = "weighted_kmeans_update";
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  points = torch::stable::contiguous(points);
  mass = beside(mass, points, kOp, "mass");
  cluster = beside(cluster, points, kOp, "cluster");
  distance = beside(distance, points, kOp, "distance");
  live = beside(live, points, kOp, "live");
  const int64_t batch = points.size(0), num_tokens = points.size(1), num_slots = live.size(1);
  Tensor repaired = torch::stable::empty_like(cluster);
  Tensor centres = torch::stable::new_empty(points, {batch, num_slots, points.size(2)}, ScalarType::Float);
  Tensor nearest = torch::stable::new_empty(cluster, {batch, num_slots});
  Tensor taker = torch::stable::new_empty(cluster, {batch, num_slots});
  const Launcher launch(points.get_device_index());
  const Repair repair{batch, num_tokens, num_slots, data<const float>(mass), data<const float>(distance),
                      data<const bool>(live), data<const int64_t>(cluster), data<int64_t>(nearest),
                      data<int64_t>(taker), data<int64_t>(repaired)};
  dispatch_tokens(points, kOp, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    weighted_kmeans_update(
        launch, repair, MergeSlots<T, float>{sequences<T>(points), data<const float>(mass),
                                             data<const int64_t>(repaired), num_slots, data<float>(centres), nullptr,
                                             nullptr});
  });
  return {repaired, centres};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CUDA, m) {
  m.impl("weighted_kmeans_assign", TORCH_BOX(&assign_cuda));
  m.impl("weighted_kmeans_update", TORCH_BOX(&update_cuda));
}

}  // namespace qm_spec
