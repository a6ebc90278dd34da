# pyengine._cuda, the ops on NVIDIA devices: a module of its own, so that _C never needs CUDA.
#   PYENGINE_CUDA=auto  where nvcc and a GPU are present, for that GPU
#   PYENGINE_CUDA=on    for every supported architecture and as PTX for later ones (or PYENGINE_CUDA_ARCHITECTURES)
#   PYENGINE_CUDA=off   never
set(PYENGINE_CUDA auto CACHE STRING "Build the CUDA kernels: auto, on or off")
set(PYENGINE_CUDA_ARCHITECTURES "" CACHE STRING "Architectures as CMake names them; empty: as PYENGINE_CUDA says")
set(all_architectures 80-real 86-real 89-real 90a-real 100-real 120)

string(TOLOWER "${PYENGINE_CUDA}" wanted)
if(NOT wanted MATCHES "^(auto|on|off|1|0|true|false)$")
  message(FATAL_ERROR "pyengine: expected PYENGINE_CUDA to be auto, on or off but got ${PYENGINE_CUDA}")
endif()
if(wanted MATCHES "^(off|0|false)$")
  return()
endif()

find_program(PYENGINE_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(NOT PYENGINE_NVCC)
  if(wanted STREQUAL auto)
    message(STATUS "pyengine: no nvcc, so the package is built for CPUs only")
    return()
  endif()
  message(FATAL_ERROR "pyengine: PYENGINE_CUDA=${PYENGINE_CUDA} needs nvcc but there is none on PATH: install the CUDA toolkit")
endif()

set(architectures ${PYENGINE_CUDA_ARCHITECTURES})
if(NOT architectures AND wanted STREQUAL auto)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE capabilities
                  RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed OR capabilities STREQUAL "")
    message(STATUS "pyengine: nvcc but no GPU, so the package is built for CPUs only; -DPYENGINE_CUDA=on builds for all GPUs")
    return()
  endif()
  string(REGEX REPLACE "[.]" "" capabilities "${capabilities}")
  string(REGEX REPLACE "[\n\r ]+" ";" capabilities "${capabilities}")
  list(REMOVE_DUPLICATES capabilities)
  # A GPU that the kernels or this nvcc cannot be built for must not fail the install of everything else.
  execute_process(COMMAND ${PYENGINE_NVCC} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
  string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
  foreach(capability ${capabilities})
    if(capability LESS 80)
      message(STATUS "pyengine: the CUDA kernels need compute capability 8.0 but a GPU here has ${capability}: none for it")
    elseif(known AND NOT "sm_${capability}" IN_LIST known)
      message(STATUS "pyengine: this nvcc is older than a GPU here, of sm_${capability}: no CUDA kernels for it")
    else()
      list(APPEND architectures ${capability}-real)
    endif()
  endforeach()
  if(NOT architectures)
    message(STATUS "pyengine: no GPU that the CUDA kernels can be built for, so the package is built for CPUs only")
    return()
  endif()
elseif(NOT architectures)
  set(architectures ${all_architectures})
endif()

set(CMAKE_CUDA_COMPILER ${PYENGINE_NVCC})
set(CMAKE_CUDA_ARCHITECTURES ${architectures})
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
message(STATUS "pyengine: CUDA kernels for ${architectures}")

set(instances)
foreach(type bfloat16 float16)
  foreach(head_dim 64 72 128)
    set(instance ${CMAKE_CURRENT_BINARY_DIR}/cuda/frame_window_attention_${type}_${head_dim}.cu)
    configure_file(csrc/ops/frame_window_attention/cuda_instance.cu.in ${instance} @ONLY)
    list(APPEND instances ${instance})
  endforeach()
endforeach()

# Of the folder of an op: every .cu, cuda*.cc, and bind.cc if the op has a cuda.cu.
file(GLOB kernels CONFIGURE_DEPENDS csrc/ops/*/*.cu)
file(GLOB sources CONFIGURE_DEPENDS csrc/ops/*/cuda*.cc)
foreach(kernel ${kernels})
  if(kernel MATCHES "/cuda[.]cu$")
    string(REPLACE "/cuda.cu" "/bind.cc" binding ${kernel})
    list(APPEND sources ${binding})
  endif()
endforeach()
pybind11_add_module(_cuda MODULE NO_EXTRAS
  csrc/bindings/arguments.cc
  csrc/bindings/cuda_module.cc
  csrc/bindings/device_array.cc
  csrc/bindings/op_binding.cc
  csrc/core/cuda/device_info.cc
  csrc/core/tensor.cc
  ${sources}
  ${kernels}
  ${instances})
target_compile_definitions(_cuda PRIVATE PYENGINE_BIND_CUDA)
target_include_directories(_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O2;${warnings}>)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
install(TARGETS _cuda LIBRARY DESTINATION pyengine)
add_dependencies(extensions _cuda)

# The compiler's report of registers, shared memory and spills, one file per kernel source; a spill fails the build.
set(reports ${CMAKE_CURRENT_BINARY_DIR}/cuda/registers)
set(python ${Python_EXECUTABLE} ${PYTHON_EXECUTABLE})  # pybind11 sets one of them, scikit-build both
list(GET python 0 python)
set(ptxas ${python} ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cmake/ptxas_report.py)
set_target_properties(_cuda PROPERTIES CUDA_COMPILER_LAUNCHER "${ptxas};compile;${reports}")
add_custom_command(TARGET _cuda POST_BUILD COMMAND ${ptxas} print ${reports} VERBATIM)
