# How every target is compiled: warnings, sanitizers, ccache.

add_compile_options(-Wall -Wextra -Wno-missing-field-initializers)
if(CMAKE_CXX_COMPILER_ID STREQUAL Clang)
  add_compile_options(-Wno-unknown-warning-option)  # of the pragmas that are for GCC
endif()

if(ANYKVM_SANITIZE)
  add_compile_options(-fsanitize=${ANYKVM_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${ANYKVM_SANITIZE})
  if(ANYKVM_SANITIZE MATCHES undefined)
    add_compile_options(-fno-sanitize-recover=undefined)
  endif()
  if(ANYKVM_FUZZ)
    add_compile_options(-fsanitize=fuzzer-no-link)
    add_compile_definitions(ANYKVM_FUZZ)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL Clang)
    if(ANYKVM_SANITIZE MATCHES undefined)
      # Code that the engine has generated carries no type in front of it.
      add_compile_options(-fno-sanitize=function)
    endif()
    # GCC says so itself.
    if(ANYKVM_SANITIZE MATCHES address)
      add_compile_definitions(__SANITIZE_ADDRESS__)
    elseif(ANYKVM_SANITIZE MATCHES thread)
      add_compile_definitions(__SANITIZE_THREAD__)
    endif()
  endif()
endif()

find_program(CCACHE ccache)
if(CCACHE)
  # The sloppiness that precompiled headers need to be cacheable at all; harmless otherwise.
  set(ANYKVM_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${ANYKVM_LAUNCHER})
  set(CMAKE_C_COMPILER_LAUNCHER ${ANYKVM_LAUNCHER})
endif()
