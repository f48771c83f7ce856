# From adapter names to merged models, with make's ordinary dependencies:
#
#   make -j2 merged/OWNER--NAME.gguf BASE=models/base.gguf
#
# fetches the adapter OWNER/NAME from the Hub, converts it, and merges it into BASE. An adapter that you have goes into
# adapters/NAME/ (its adapter_config.json and adapter_model.safetensors) and is not fetched.

LORA_GGUF ?= lora-gguf
BASE ?= models/base.gguf
SCALE ?= 1.0
MERGE_FLAGS ?=

adapters/%/adapter_config.json:
	$(LORA_GGUF) fetch '$(subst --,/,$*)' -o $(@D)

adapters/%.gguf: adapters/%/adapter_config.json $(BASE)
	$(LORA_GGUF) convert $(<D) --base $(BASE) -o $@ --force

merged/%.gguf: adapters/%.gguf $(BASE)
	mkdir -p $(@D)
	$(LORA_GGUF) merge $(BASE) $< -o $@ --scale $(SCALE) $(MERGE_FLAGS) --force
