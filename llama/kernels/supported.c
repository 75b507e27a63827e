/* Whether this CPU runs the kernels; elsewhere than on x86-64 nothing else of them is compiled. */
int promptstitch_kernels_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
