# What `make bench` measures: a program on the public API, and the guest that runs the same loops under QEMU.

file(GLOB BENCH_SOURCES CONFIGURE_DEPENDS bench/*.cpp)
add_executable(anykvm_bench ${BENCH_SOURCES} bench/loops.S)
target_link_libraries(anykvm_bench PRIVATE anykvm::anykvm)

if(NOT ANYKVM_SANITIZE)
  add_executable(bench_tcg_guest bench/tcg_guest.S bench/loops.S)
  target_compile_definitions(bench_tcg_guest PRIVATE ITERATIONS=50000000)
  target_compile_options(bench_tcg_guest PRIVATE -fno-pic)
  target_link_options(bench_tcg_guest PRIVATE -nostdlib -static -no-pie -Wl,-Ttext=0x100000 -Wl,-e,start
                      -Wl,--build-id=none)
  set_target_properties(bench_tcg_guest PROPERTIES POSITION_INDEPENDENT_CODE OFF)
endif()
