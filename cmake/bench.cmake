# What `make bench` measures inside one process: a program on the public API.

file(GLOB BENCH_SOURCES CONFIGURE_DEPENDS bench/*.cpp)
add_executable(anykvm_bench ${BENCH_SOURCES} bench/loops.S)
target_link_libraries(anykvm_bench PRIVATE anykvm::anykvm)
