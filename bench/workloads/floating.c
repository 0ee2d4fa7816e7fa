// Floating-point kernels: SSE doubles, and the x87 unit by way of long double. Results are compared to the last bit.
#include <math.h>

#include "workload.h"

static uint64_t bits(double value) {
  uint64_t result;
  memcpy(&result, &value, sizeof result);
  return result;
}

static uint64_t matrix(long repetitions) {
  enum { size = 128 };
  static double a[size][size], b[size][size], product[size][size];
  for (int i = 0; i < size; ++i)
    for (int j = 0; j < size; ++j) a[i][j] = 1.0 / (i + j + 1), b[i][j] = (i * 7 + j * 3) % 11 - 5;
  uint64_t sum = 0;
  for (long n = 0; n < repetitions; ++n) {
    memset(product, 0, sizeof product);
    for (int i = 0; i < size; ++i)
      for (int k = 0; k < size; ++k)
        for (int j = 0; j < size; ++j) product[i][j] += a[i][k] * b[k][j];
    a[n % size][n % 7] += 0.001;
    sum ^= bits(product[n % size][n * 5 % size]) + n;
  }
  return sum;
}

/// A sun and four planets, as everybody's n-body benchmark; plain scalar doubles with division and square root.
static uint64_t nbody(long repetitions) {
  enum { count = 5 };
  static double position[count][3] = {
      {0, 0, 0}, {4.84, -1.16, -0.10}, {8.34, 4.12, -0.40}, {12.89, -15.11, -0.22}, {15.37, -25.9, 0.18}};
  static double velocity[count][3] = {
      {0, 0, 0}, {0.61, 2.81, -0.03}, {-1.01, 1.82, 0.01}, {1.08, 0.87, -0.01}, {0.98, 0.59, -0.03}};
  static const double mass[count] = {39.48, 0.0377, 0.0113, 0.0017, 0.0020};
  const double step = 0.01;
  for (long n = 0; n < repetitions; ++n) {
    for (int i = 0; i < count; ++i)
      for (int j = i + 1; j < count; ++j) {
        double distance[3], square = 0;
        for (int k = 0; k < 3; ++k) distance[k] = position[i][k] - position[j][k], square += distance[k] * distance[k];
        const double magnitude = step / (square * sqrt(square));
        for (int k = 0; k < 3; ++k) {
          velocity[i][k] -= distance[k] * mass[j] * magnitude;
          velocity[j][k] += distance[k] * mass[i] * magnitude;
        }
      }
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < 3; ++k) position[i][k] += step * velocity[i][k];
  }
  uint64_t sum = 0;
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < 3; ++k) sum = sum * 31 + bits(position[i][k]);
  return sum;
}

static uint64_t x87(long repetitions) {
  long double x = 0.5L, y = 0.25L, sum = 0;
  long turns = 0;
  for (long n = 0; n < repetitions; ++n) {
    const long double next = x * x - y * y + 0.285L;  // a Julia set's orbit
    y = 2 * x * y + 0.01L;
    x = next;
    if (x * x + y * y > 4) x = 0.5L / (1 + turns % 16), y = 0.25L, ++turns;
    sum += fabsl(x) / (1 + y * y);
    if ((n & 15) == 0) sum = sqrtl(sum) + rintl(sum / 64);
  }
  return bits((double)sum) + turns;
}

int main(int argc, char** argv) {
  static const struct workload workloads[] = {{"matrix", matrix}, {"nbody", nbody}, {"x87", x87}};
  return RUN_WORKLOAD(workloads);
}
