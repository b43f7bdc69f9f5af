// The filter gradient by rows. A filter's sum is taken of units, parts of an image that stay in the cache.

#include "row_lanes.h"
#include "row_schedule.h"

namespace jax_dwbp {
namespace {

// The result may not depend on the number of threads: this many parts of it, at least, are summed by
// themselves, of which the sums take at most so many bytes.
constexpr int64_t kParts = 32;
constexpr int64_t kPartBytes = 4 << 20;
// Of so many lines the sums join those of others.
constexpr int64_t kFoldLines = 2048;

// How the work is cut. All but the threads is fixed by the shapes.
struct SumPlan {
  const RowCall& call;
  int64_t period, lanes, line_step, variants;
  int64_t taps, filters;
  int64_t column, columns;  // of dy that meet more than padding
  int64_t tile, tiles;      // columns
  int64_t band, bands;      // rows
  int64_t in_step, dy_step;
  int64_t units, parts;     // of a filter
  int64_t threads, group;   // filters of a task
  int64_t in_lines, dy_lines, fold_lines, lines;

  SumPlan(const RowCall& call, int64_t pool_threads)
      : call(call),
        period(call.Period()),
        lanes(call.kernels.lanes),
        line_step(call.LineStep()),
        variants(call.Variants()),
        taps(call.rows.kernel * call.columns.kernel),
        filters(call.sizes.problems * call.Planes()) {
    const RowAxis &rows = call.rows, &across = call.columns;
    const int64_t element = sizeof(Line) / lanes;
    int64_t end = 0;
    column = across.out;
    for (const RowRegion& region : across.regions) {
      column = std::min(column, std::max<int64_t>(0, -region.first - region.extra));
      end = std::max(end, std::min(across.out, across.InSize(region.phase) - region.first));
    }
    columns = std::max<int64_t>(0, end - column);
    tile = std::clamp<int64_t>(columns, 1, across.Fitting(kRowBytes / element / period));
    tiles = CeilDiv(columns, tile);
    in_step = (CeilDiv(across.Packed(tile) * period, lanes) | 1) * lanes;
    dy_step = (CeilDiv(tile * period, lanes) | 1) * lanes;
    const int64_t row_step = rows.regions.Size() * in_step + dy_step;
    const int64_t fitting = (kBandBytes / element - rows.extra * in_step) / row_step;
    bands = CeilDiv(rows.out, std::max(fitting, rows.Least()));
    band = CeilDiv(rows.out, bands);
    units = call.sizes.batch * bands * tiles;
    fold_lines = CeilDiv(taps * period, lanes);
    const int64_t most = kPartBytes / static_cast<int64_t>(sizeof(Line)) / (filters * fold_lines);
    parts = std::max<int64_t>(1, std::min({CeilDiv(kParts, filters), most, units}));
    const int64_t work = filters * units * band * CeilDiv(tile * period, lanes) * taps;
    threads = work < kSmall ? 1 : std::max<int64_t>(pool_threads, 1);  // a host may have no pool
    group = parts > 1 ? 1 : CeilDiv(filters, kTasks * threads);
    // With what the last line reads behind its row.
    in_lines = rows.Packed(band) * in_step / lanes + 1;
    dy_lines = band * dy_step / lanes + 1;
    lines = in_lines + dy_lines + 2 * variants * taps + fold_lines;
  }
};

// What a thread sums of a part.
struct Sums {
  const SumPlan& plan;
  Line *in, *dy;
  Line* lines[2];      // of whole lines, and of the one at the end of each row, which may be less
  Line* total;
  int64_t values = 0;  // of a row
  int64_t summed = 0;
  bool has_zeros = false;

  Sums(const SumPlan& plan, Line* memory, Line* total) : plan(plan), total(total) {
    in = memory;
    dy = in + plan.in_lines;
    lines[0] = dy + plan.dy_lines;
    lines[1] = lines[0] + plan.variants * plan.taps;
    Clear();
    std::memset(total, 0, plan.fold_lines * sizeof(Line));
  }

  void Clear() {
    std::memset(lines[0], 0, 2 * plan.variants * plan.taps * sizeof(Line));
    summed = 0;
  }
  // Values of a line that count, whole lines of a row, and what the last one has.
  int64_t LineValues() const { return std::min(plan.line_step, plan.lanes); }
  int64_t WholeLines(int64_t variant) const {
    const int64_t room = values - variant * plan.lanes - LineValues();
    return room < 0 ? 0 : room / plan.line_step + 1;
  }
  int64_t Rest(int64_t variant) const {
    const int64_t end = variant * plan.lanes + WholeLines(variant) * plan.line_step;
    return std::clamp<int64_t>(values - end, 0, plan.lanes);
  }

  void Fold() {
    if (summed == 0) return;
    for (int64_t variant = 0; variant < plan.variants; ++variant) {
      const int64_t counts[] = {LineValues(), Rest(variant)};
      for (int i = 0; i < 2; ++i) {
        plan.call.kernels.row_sums->fold({lines[i] + variant * plan.taps, plan.taps, plan.period,
                                          variant * plan.lanes % plan.period, counts[i], total});
      }
    }
    Clear();
  }

  // Adds what is in some rows and columns of an image.
  void Add(const char* x_plane, const char* dy_plane, int64_t band, int64_t tile) {
    const RowCall& call = plan.call;
    const int64_t row = band * plan.band, rows = std::min(plan.band, call.rows.out - row);
    const int64_t column = plan.column + tile * plan.tile;
    const int64_t columns = std::min(plan.tile, plan.column + plan.columns - column);
    CopyWindow(call.kernels, {plan.period, 1, 1, call.out.column}, call.out.row, dy_plane,
               {row, 1, rows, 0, 1, column, columns, call.columns.out, true}, dy, 0, plan.dy_step);
    const int64_t row_lines = CeilDiv(columns * plan.period, plan.line_step) + 1;
    if (columns * plan.period != values || summed + rows * row_lines > kFoldLines) Fold();
    values = columns * plan.period;
    summed += rows * row_lines;
    for (int64_t i = 0; i < call.rows.regions.Size(); ++i) {
      const RowRegion& region = call.rows.regions[i];
      const int64_t in_row = std::max<int64_t>(0, row + region.first);
      const int64_t in_end =
          std::min(call.rows.InSize(region.phase), row + rows + region.first + region.extra);
      if (in_row >= in_end) continue;
      const int64_t start = call.rows.Start(i, plan.band) * plan.in_step;
      for (int64_t j = 0; j < call.columns.regions.Size(); ++j) {
        const RowRegion& side = call.columns.regions[j];
        const int64_t first = start + call.columns.Start(j, plan.tile) * plan.period;
        CopyWindow(call.kernels, call.InPixels(), call.in.row, x_plane,
                   {in_row * call.rows.read_step + region.phase, call.rows.read_step, in_end - in_row,
                    side.phase, call.columns.read_step, column + side.first, columns + side.extra,
                    call.columns.InSize(side.phase), has_zeros},
                   in, first, plan.in_step);
        const int64_t line = call.rows.Before(i) * call.columns.kernel + call.columns.Before(j);
        for (int64_t variant = 0; variant < plan.variants; ++variant) {
          const int64_t begin = variant * plan.lanes, whole = WholeLines(variant);
          const int64_t firsts[] = {begin, begin + whole * plan.line_step};
          const int64_t counts[] = {whole, Rest(variant) > 0};
          for (int k = 0; k < 2; ++k) {
            if (counts[k] == 0) continue;
            call.kernels.row_sums->correlate(
                {in, first + firsts[k], plan.in_step, in_end - in_row, dy, firsts[k], plan.dy_step, rows,
                 row + region.first - in_row, call.rows.dilation, call.rows.taps[i].count,
                 call.columns.taps[j].count, call.columns.dilation * plan.period, counts[k], plan.line_step,
                 lines[k] + variant * plan.taps + line, call.columns.kernel});
          }
        }
      }
    }
    has_zeros = plan.bands * plan.tiles == 1;
  }
};

}  // namespace

void CorrelateRows(ffi::ThreadPool& pool, const RowCall& call) {
  const SumPlan plan(call, pool.num_threads());
  const RowSums& kernels = *call.kernels.row_sums;
  const int64_t element = call.kernels.element_size, channels = call.Planes();
  const int64_t groups = CeilDiv(plan.filters, plan.group);
  const bool has_parts = plan.parts > 1;
  const std::vector<int64_t> taps = call.Taps();
  const std::unique_ptr<Line[]> memory(
      has_parts ? new Line[plan.filters * plan.parts * plan.fold_lines] : nullptr);
  const auto join = [&](int64_t filter, Line* parts) {
    const int64_t out = filter / channels * call.filter.problem + filter % channels;
    kernels.join({parts, plan.parts, plan.fold_lines * plan.lanes, taps.data(), plan.taps, plan.period,
                  call.filter.data + out * element, call.TapStep()});
  };
  ParallelFor(pool, plan.threads, groups * plan.parts, plan.lines, [&](Scratch& scratch, int64_t task) {
    const int64_t part = task % plan.parts, group = task / plan.parts;
    Line* const lines = scratch.Lines(plan.lines);
    const int64_t end = std::min((group + 1) * plan.group, plan.filters);
    for (int64_t filter = group * plan.group; filter < end; ++filter) {
      Line* const total = has_parts ? memory.get() + (filter * plan.parts + part) * plan.fold_lines
                                    : lines + plan.lines - plan.fold_lines;
      Sums sums(plan, lines, total);
      const int64_t problem = filter / channels, channel = filter % channels;
      const int64_t last = (part + 1) * plan.units / plan.parts;
      for (int64_t unit = part * plan.units / plan.parts; unit < last; ++unit) {
        const int64_t tile = unit % plan.tiles, band = unit / plan.tiles % plan.bands;
        const int64_t image = problem * call.sizes.batch + unit / plan.tiles / plan.bands;
        sums.Add(call.in.data + (image * call.in.image + call.InPlane(channel)) * element,
                 call.out.data + (image * call.out.image + call.OutPlane(channel)) * element, band, tile);
      }
      sums.Fold();
      if (!has_parts) join(filter, total);
    }
  });
  for (int64_t filter = 0; filter < plan.filters && has_parts; ++filter) {
    join(filter, memory.get() + filter * plan.parts * plan.fold_lines);
  }
}

}  // namespace jax_dwbp
