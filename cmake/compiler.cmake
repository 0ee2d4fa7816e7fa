# How every target is compiled: warnings, sanitizers, ccache.

add_compile_options(-Wall -Wextra -Wno-missing-field-initializers)

if(ANYKVM_SANITIZE)
  add_compile_options(-fsanitize=${ANYKVM_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${ANYKVM_SANITIZE})
  if(ANYKVM_SANITIZE MATCHES undefined)
    add_compile_options(-fno-sanitize-recover=undefined)
  endif()
endif()

find_program(CCACHE ccache)
if(CCACHE)
  # The sloppiness that precompiled headers need to be cacheable at all; harmless otherwise.
  set(ANYKVM_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${ANYKVM_LAUNCHER})
  set(CMAKE_C_COMPILER_LAUNCHER ${ANYKVM_LAUNCHER})
endif()
