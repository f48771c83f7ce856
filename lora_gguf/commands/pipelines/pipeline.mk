# Many adapters, many quantizations, with make's ordinary dependencies: what is there is not made again, what is
# missing is fetched, what changed is merged anew. Any target may be killed; -j runs as many at once as memory allows.
#
#   merged/ADAPTER--QUANT.gguf       the adapter in the base of that quantization, and .Modelfile for Ollama beside it
#   adapters/ADAPTER/                the adapter; of OWNER/NAME on the Hub it is fetched into adapters/OWNER--NAME/
#   adapters/ADAPTER--QUANT.gguf     the adapter alone, for llama.cpp's --lora
#   models/QUANT.gguf                the base, fetched from the Hub where it is not there
#   ollama/ADAPTER--QUANT            the merged file in Ollama
#
# ADAPTERS, QUANTS, BASE and the rest are set in the Makefile that includes this.

LORA_GGUF ?= lora-gguf
OLLAMA ?= ollama
QUANTS ?= Q4_K_M
MERGE_FLAGS ?=
CONVERT_FLAGS ?=

adapter_names := $(subst /,--,$(ADAPTERS))
outputs := $(foreach name,$(adapter_names),$(addprefix $(name)--,$(QUANTS)))
first_adapter := $(firstword $(ADAPTERS))
# what `fetch --quant` finds the base by: BASE, or the first adapter, which says what it was trained on
base_source = $(or $(BASE),$(if $(findstring /,$(first_adapter)),$(first_adapter),adapters/$(first_adapter)))

.PHONY: all help merged-files adapter-files ollama-models
.DELETE_ON_ERROR:
.SECONDARY:
.SECONDEXPANSION:

# with -j, what each command says stands together, below its command line
MAKEFLAGS += --output-sync=target

all: merged-files
help:
	@sed -n 's/^# \(make.*\)/\1/p' $(firstword $(MAKEFILE_LIST))
merged-files: $(outputs:%=merged/%.gguf) $(outputs:%=merged/%.Modelfile)
adapter-files: $(outputs:%=adapters/%.gguf)
ollama-models: $(outputs:%=ollama/%)

adapters merged models ollama:
	mkdir -p $@

models/%.gguf: | models
	$(LORA_GGUF) fetch '$(base_source)' --quant '$*' -o '$@'

adapters/%/adapter_config.json: | adapters
	$(LORA_GGUF) fetch '$(subst --,/,$*)' -o '$(@D)'

# what of an adapter's folder a merge may read
adapter_inputs = $(wildcard $(addprefix adapters/$(1)/*.,safetensors bin json jinja model))

define rules_of_quant
merged/%--$(1).gguf merged/%--$(1).Modelfile: adapters/%/adapter_config.json $$$$(call adapter_inputs,$$$$*) models/$(1).gguf | merged
	$$(LORA_GGUF) merge 'models/$(1).gguf' 'adapters/$$*' -o 'merged/$$*--$(1).gguf' --modelfile --force $$(MERGE_FLAGS)

adapters/%--$(1).gguf: adapters/%/adapter_config.json $$$$(call adapter_inputs,$$$$*) models/$(1).gguf
	$$(LORA_GGUF) convert 'adapters/$$*' --base 'models/$(1).gguf' -o '$$@' --force $$(CONVERT_FLAGS)
endef
$(foreach quant,$(QUANTS),$(eval $(call rules_of_quant,$(quant))))

ollama/%: merged/%.gguf merged/%.Modelfile | ollama
	$(OLLAMA) create '$*' -f 'merged/$*.Modelfile'
	touch '$@'
