"""What is particular to each architecture, as data: its Hugging Face classes and the layout of its weights.

A layer without a rule keeps its layout, and its name is the one that the ``gguf`` package's name map gives. Per-expert
modules (``experts.7.w1``) match rules without their number and become one slot each of the stacked tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_gguf.mapping import transforms as t
from lora_gguf.mapping.transforms import Op, Scale


@dataclass(frozen=True)
class Out:
    """One GGUF tensor that a module becomes: ``tensor`` is its name in the block (None: as the name map says).

    ``slots`` is the key of a number: the rows are cut in so many matrices, stacked along a leading axis; ``transpose``
    turns each. ``shift`` is what GGUF adds to the module's weight, ``instead`` its name where the base lacks the first.
    """

    tensor: str | None = None
    rows: tuple[Op, ...] = ()
    cols: tuple[Op, ...] = ()
    scale: Scale | None = None
    slots: str | None = None
    transpose: bool = False
    shift: float = 0.0
    instead: str | None = None


@dataclass(frozen=True)
class Rule:
    """The modules whose path ends with a match of ``pattern``, and the tensors that each becomes.

    ``needs`` is a key that the base must have (and not as 0) for the rule to hold.
    """

    pattern: str
    outs: tuple[Out, ...]
    needs: str | None = None


@dataclass(frozen=True)
class Stored:
    """How a class of transformers holds packed experts: (E, in, out) or (E, out, in), and whether it declares that."""

    in_out: bool = False
    declared: bool = False


@dataclass(frozen=True)
class Architecture:
    """``hf`` are the class names in config.json's ``architectures``.

    ``ignored_at_run_time`` matches the GGUF names on which llama.cpp does not apply adapters. ``fused_experts`` tells
    that gate and up of the experts stay one tensor. ``norm_shift`` is what GGUF adds to the norms (None: different
    things to each). ``other_vocabulary``: the GGUF has fewer or more rows of embedding than Hugging Face; ``headless``:
    no output layer, so that no head is tied to the embedding. ``normalised``: a module that the GGUF holds normalised
    if a field of config.json is true, and that field. ``caution`` is a warning for every adapter. ``packed_experts``:
    how its class holds them in transformers 5, and in 4 where that differs. ``root`` is what stands before the text
    model's modules where the class holds other models beside it. ``stacks`` are the names of several stacks of layers,
    which the GGUF counts on through.
    """

    hf: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    ignored_at_run_time: str | None = None
    fused_experts: bool = False
    norm_shift: float | None = 0.0
    other_vocabulary: bool = False
    headless: bool = False
    normalised: tuple[str, str] | None = None
    caution: str | None = None
    packed_experts: tuple[Stored, ...] = (Stored(),)
    root: str = ""
    stacks: tuple[str, ...] = ()


def rows(pattern: str, *ops: Op) -> Rule:
    """Return the modules whose rows are gathered, under their own name."""
    return Rule(pattern, (Out(rows=ops),))


def cols(pattern: str, *ops: Op) -> Rule:
    return Rule(pattern, (Out(cols=ops),))


def split(pattern: str, needs: str | None = None, /, **tensors: tuple[Op, ...]) -> Rule:
    """Return a module that becomes several tensors of the block: name -> the operations that choose its rows."""
    return Rule(pattern, tuple(Out(name, ops) for name, ops in tensors.items()), needs)


def scaled(pattern: str, *keys: str) -> Rule:
    return Rule(pattern, (Out(scale=t.times(*keys)),))


ROTARY = (rows("q_proj", t.rotary_q), rows("k_proj", t.rotary_k))
HALVES = {"ffn_gate": (t.part(0, 2),), "ffn_up": (t.part(1, 2),)}
EXPERT_HALVES = {"ffn_gate_exps": (t.part(0, 2),), "ffn_up_exps": (t.part(1, 2),)}
SHARED_HALVES = {"ffn_gate_shexp": (t.part(0, 2),), "ffn_up_shexp": (t.part(1, 2),)}
# what holds for every architecture that does not say otherwise
FUSED_EXPERTS = (split(r"experts\.gate_up_proj", **EXPERT_HALVES),)
BLOCKS = tuple(t.block(i, t.q_rows, t.kv_rows, t.kv_rows) for i in range(3))

# the last of two layers of a classifier; the only one has the name that the map gives
CLASSIFIER = (Rule("classifier", (Out("cls.output"),)),)
# q, k and v apart in Hugging Face, which the GGUF holds in one
APART = tuple(Rule(rf"self_attn\.{part}_proj", (Out(f"attn_{part}"),)) for part in "qkv")
LATENT = (
    Rule(
        "kv_b_proj",
        (
            Out("attn_k_b", (t.latent("k"),), slots=t.HEADS, transpose=True),
            Out("attn_v_b", (t.latent("v"),), slots=t.HEADS),
        ),
    ),
)
LATENT_IGNORED = (
    r"\.(attn_q|attn_q_a|attn_q_b|attn_kv_a_mqa|attn_kv_b|attn_k_b|attn_v_b|indexer\S*)\.weight$|^output\.weight$"
)
ALL_ATTENTION_IGNORED = r"\.(attn_|ssm_|indexer)\S*\.weight$|^output\.weight$"

GRANITE_DENSE = (
    split(r"shared_mlp\.input_linear", **HALVES),
    Rule(r"shared_mlp\.output_linear", (Out("ffn_down"),)),
)
GRANITE_SHARED = (
    Rule(r"block_sparse_moe\.router", (Out("ffn_gate_inp"),)),
    split(r"block_sparse_moe\.input_linear", **EXPERT_HALVES),
    split(r"shared_mlp\.input_linear", "expert_count", **SHARED_HALVES),
    Rule(r"shared_mlp\.output_linear", (Out("ffn_down_shexp"),), "expert_count"),
)
GLM_MROPE = tuple(
    Rule(pattern, (Out(rows=(t.rotary_partial(heads),)),), "rope.dimension_sections")
    for pattern, heads in (("q_proj", t.HEADS), ("k_proj", t.KV_HEADS))
)
QWEN35 = (
    rows(r"linear_attn\.in_proj_qkv", t.value_heads_of_qkv),
    rows(r"linear_attn\.in_proj_[zab]", t.value_heads),
    cols(r"linear_attn\.out_proj", t.value_heads),
)
QWEN3NEXT = (split(r"linear_attn\.in_proj_qkvz", attn_qkv=(t.qkvz("qkv"),), attn_gate=(t.qkvz("z"),)),)
ERNIE = (
    split("qkv_proj", attn_q=BLOCKS[:1], attn_k=BLOCKS[1:2], attn_v=BLOCKS[2:]),
    split(r"mlp\.up_gate_proj", **HALVES),
)
FALCON_H1 = (
    scaled("q_proj", "attention_in_multiplier"),
    scaled("k_proj", "attention_in_multiplier", "key_multiplier"),
    scaled("v_proj", "attention_in_multiplier"),
    scaled("o_proj", "attention_out_multiplier"),
    scaled("gate_proj", "mlp_multipliers.0"),
    scaled("down_proj", "mlp_multipliers.1"),
    scaled(r"mamba\.out_proj", "ssm_out_multiplier"),
    Rule(r"mamba\.in_proj", (Out(scale=t.falcon_h1_in_proj),)),
    scaled("lm_head", "lm_head_multiplier"),
    scaled("embed_tokens", "embedding_multiplier"),
)


DEEPSEEK4 = tuple(
    Rule(pattern, (Out(tensor),))
    for pattern, tensor in {
        r"(attn\.wq_a|self_attn\.q_a_proj)": "attn_q_a",
        r"(attn\.wq_b|self_attn\.q_b_proj)": "attn_q_b",
        r"(attn\.wkv|self_attn\.kv_proj)": "attn_kv",
        r"(attn\.wo_a|self_attn\.o_a_proj)": "attn_output_a",
        r"(attn\.wo_b|self_attn\.o_b_proj)": "attn_output_b",
        r"(self_)?attn\.compressor\.(wkv|kv_proj)": "attn_compressor_kv",
        r"(self_)?attn\.compressor\.(wgate|gate_proj)": "attn_compressor_gate",
        r"(attn\.indexer\.compressor\.wkv|indexer\.kv_proj)": "indexer_compressor_kv",
        r"(attn\.indexer\.compressor\.wgate|indexer\.gate_proj)": "indexer_compressor_gate",
        r"indexer\.(wq_b|q_b_proj)": "indexer.attn_q_b",
        r"indexer\.(scorer\.)?weights_proj": "indexer.proj",
        r"(ffn|mlp)\.gate": "ffn_gate_inp",
        r"shared_experts\.(w1|gate_proj)": "ffn_gate_shexp",
        r"shared_experts\.(w2|down_proj)": "ffn_down_shexp",
        r"shared_experts\.(w3|up_proj)": "ffn_up_shexp",
    }.items()
)
HRM = (
    split(
        r"attn\.gqkv_proj",
        attn_gate=(t.part(0, 4),),
        attn_q=(t.part(1, 4),),
        attn_k=(t.part(2, 4),),
        attn_v=(t.part(3, 4),),
    ),
    Rule(r"attn\.o_proj", (Out("attn_output"),)),
    split(r"mlp\.gate_up_proj", **HALVES),
)
# a model in which adapters lie already: its own layers are called base_layer
GRANITE_SWITCH = (
    Rule(r"self_attn\.qkv_proj(\.base_layer)?", (Out("attn_qkv", (t.rotary_qkv,)),)),
    Rule(r"self_attn\.o_proj(\.base_layer)?", (Out("attn_output"),)),
    split(r"shared_mlp\.input_linear(\.base_layer)?", **HALVES),
    Rule(r"shared_mlp\.output_linear(\.base_layer)?", (Out("ffn_down"),)),
)


RWKV7_TIME_MIX = {
    "receptance": "r_proj|receptance", "key": "k_proj|key", "value": "v_proj|value", "output": "o_proj|output",
}  # fmt: skip
RWKV7 = tuple(
    Rule(rf"(attention|self_attn|attn)(\.time_mixer)?\.({names})", (Out(f"time_mix_{tensor}"),))
    for tensor, names in RWKV7_TIME_MIX.items()
) + tuple(Rule(rf"(feed_forward|ffn)\.{part}", (Out(f"channel_mix_{part}"),)) for part in ("key", "value"))


def packed(pattern: str, tensor: str, transpose: bool = False) -> Rule:
    """Return all experts' rows in one matrix, (E * ff, d), cut and stacked."""
    return Rule(pattern, (Out(tensor, slots="expert_count", transpose=transpose),))


# architecture of a class, a field of config.json -> the architecture if it is there and neither 0 nor empty
VARIANTS = {
    ("bert", "lora_adaptations"): "jina-bert-v3",
    ("nemotron_h", "num_experts_per_tok"): "nemotron_h_moe",
    ("nomic-bert", "moe_every_n_layers"): "nomic-bert-moe",
}
ATTENTION_PARTS = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
DRAFT = "a draft model, which an adapter of the model that it drafts for is not made for: name that model's GGUF"
CODEC = "an audio codec, which is not fine-tuned with adapters: name the GGUF of the language model that it speaks for"
# what llama.cpp converts and no adapter is merged into: GGUF's general.architecture, or a class -> why
REFUSED = {
    **dict.fromkeys(
        (
            "dflash", "eagle3", "gemma4-assistant", "DeepseekV4DSparkModel", "Gemma4DSparkModel", "DFlashDraftModel",
            "DFlash2DraftModel", "Qwen3DSparkModel", "DSparkDraftModel", "DSparkSpeculator", "Lfm2DSparkDraftModel",
            "LingDSparkModel", "MuseGlimmerAssistantModel", "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM",
            "Eagle3Speculator", "Eagle3DraftModel", "Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM",
        ),
        DRAFT,
    ),
    **dict.fromkeys(("wavtokenizer-dec", "WavTokenizerDec", "Lfm25AudioTokenizer"), CODEC),
}  # fmt: skip
# GGUF's general.architecture -> its row
ARCHITECTURES: dict[str, Architecture] = {
    "clip": Architecture(headless=True),  # vision and audio towers, whose layouts are in towers.py
    "llama": Architecture(
        (
            "LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "LlamaModel",
            "InternLM3ForCausalLM", "VLlama3ForCausalLM", "LlavaForConditionalGeneration", "IQuestCoderForCausalLM",
            "VoxtralForConditionalGeneration", "SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration",
            "JanusForConditionalGeneration", "Sarashina2VisionForCausalLM", "UltravoxModel",
        ),
        ROTARY,
    ),
    "llama-embed": Architecture(("LlamaBidirectionalModel",), ROTARY, headless=True),
    "llama4": Architecture(
        ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"), packed_experts=(Stored(in_out=True),)
    ),
    "mistral3": Architecture(("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"), ROTARY),
    "mistral4": Architecture(("Mistral4ForCausalLM",), LATENT, LATENT_IGNORED, fused_experts=True),
    "smollm3": Architecture(("SmolLM3ForCausalLM",), ROTARY),
    "arcee": Architecture(("ArceeForCausalLM",), ROTARY),
    "arctic": Architecture(("ArcticForCausalLM",), ROTARY),
    "deci": Architecture(("DeciLMForCausalLM",), ROTARY),
    "minicpm": Architecture(("MiniCPMForCausalLM",), ROTARY),
    "minicpm3": Architecture(("MiniCPM3ForCausalLM",), (), r"\.attn_(q_a|q_b|kv_a_mqa|kv_b)\.weight$"),
    "olmo": Architecture(("OlmoForCausalLM", "OLMoForCausalLM"), ROTARY),
    "olmo2": Architecture(("Olmo2ForCausalLM", "Olmo3ForCausalLM")),
    "olmoe": Architecture(("OlmoeForCausalLM",)),
    "cogvlm": Architecture(("CogVLMForCausalLM",)),
    "chameleon": Architecture(("ChameleonForConditionalGeneration", "ChameleonForCausalLM"), ROTARY, norm_shift=None),
    "llada": Architecture(("LLaDAModelLM",), ROTARY),
    "llada-moe": Architecture(("LLaDAMoEModel", "LLaDAMoEModelLM")),
    "xverse": Architecture(("XverseForCausalLM",), (rows("q_proj", t.rotary_q), rows("k_proj", t.rotary_k_xverse))),
    "granite": Architecture(
        ("GraniteForCausalLM", "GraniteSpeechForConditionalGeneration", "GraniteSpeechPlusForConditionalGeneration"),
        (*ROTARY, *GRANITE_DENSE),
    ),
    "granitemoe": Architecture(("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"), (*ROTARY, *GRANITE_SHARED)),
    "granite_swa": Architecture(
        ("GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM"),
        (
            *ROTARY,
            Rule(r"block_sparse_moe\.router", (Out("ffn_gate_inp"),)),
            Rule(r"block_sparse_moe\.(input_linear|experts\.gate_up_proj)", (Out("ffn_gate_up_exps"),)),
            Rule(r"shared_mlp\.input_linear", (Out("ffn_up_shexp"),)),
            Rule(r"shared_mlp\.output_linear", (Out("ffn_down_shexp"),)),
        ),
        fused_experts=True,
    ),
    "graniteswitch": Architecture(("GraniteSwitchForCausalLM",), GRANITE_SWITCH),
    "granitehybrid": Architecture(
        ("GraniteMoeHybridForCausalLM", "BambaForCausalLM"), (*ROTARY, *GRANITE_SHARED, *GRANITE_DENSE)
    ),
    "internlm2": Architecture(
        ("InternLM2ForCausalLM",),
        (
            split(
                "wqkv",
                attn_q=(t.grouped("q"), t.rotary_q),
                attn_k=(t.grouped("k"), t.rotary_k),
                attn_v=(t.grouped("v"),),
            ),
        ),
    ),
    "baichuan": Architecture(
        ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        (
            split(
                "W_pack", attn_q=(t.part(0, 3), t.rotary_q), attn_k=(t.part(1, 3), t.rotary_k), attn_v=(t.part(2, 3),)
            ),
        ),
    ),
    "bailingmoe": Architecture(
        ("BailingMoeForCausalLM",),
        (
            split(
                "query_key_value",
                attn_q=(BLOCKS[0], t.rotary_q),
                attn_k=(BLOCKS[1], t.rotary_k),
                attn_v=(BLOCKS[2],),
            ),
        ),
        normalised=("lm_head", "norm_head"),
    ),
    "bailingmoe2": Architecture(
        ("BailingMoeV2ForCausalLM", "SarvamMoEForCausalLM", "modeling_sarvam_moe.SarvamMoEForCausalLM")
    ),
    "bailingmoe3": Architecture(
        ("BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration"),
        (
            *LATENT,
            Rule(r"attention\.f_proj", (Out("ssm_f_a"),)),
            Rule(r"attention\.g_proj", (Out("attn_gate", instead="ssm_g_a"),)),
        ),
        ALL_ATTENTION_IGNORED,
    ),
    "ernie4_5": Architecture(("Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"), ERNIE),
    "paddleocr": Architecture(("PaddleOCRVLForConditionalGeneration",), ERNIE),
    "ernie4_5-moe": Architecture(
        ("Ernie4_5_MoeForCausalLM",),
        (
            split("qkv_proj", attn_q=BLOCKS[:1], attn_k=BLOCKS[1:2], attn_v=BLOCKS[2:]),
            split(r"experts\.up_gate_proj", **EXPERT_HALVES),
            split(r"up_gate_proj", **HALVES),
        ),
    ),
    "qwen": Architecture(("QWenLMHeadModel",)),
    "qwen2": Architecture(
        (
            "Qwen2ForCausalLM", "Qwen2Model", "Qwen2AudioForConditionalGeneration", "KORMoForCausalLM",
            "DotsOCRForCausalLM", "AudioFlamingo3ForConditionalGeneration",
        )
    ),
    "qwen2vl": Architecture(
        (
            "Qwen2VLModel", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration",
        )
    ),
    "qwen2moe": Architecture(("Qwen2MoeForCausalLM",)),
    "qwen3": Architecture(("Qwen3ForCausalLM", "Qwen3Model", "StepVLForConditionalGeneration")),
    "qwen3moe": Architecture(("Qwen3MoeForCausalLM",)),
    "qwen3vl": Architecture(("Qwen3VLForConditionalGeneration", "Qwen3ASRForConditionalGeneration")),
    "qwen3vlmoe": Architecture(
        ("Qwen3VLMoeForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"),
        packed_experts=(Stored(), Stored(in_out=True)),
    ),
    "qwen3next": Architecture(("Qwen3NextForCausalLM",), QWEN3NEXT, norm_shift=1.0),
    "qwen35": Architecture(
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "MiniCPMV4_6ForConditionalGeneration"),
        QWEN35,
        norm_shift=1.0,
    ),
    "qwen4exp": Architecture(
        ("Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM"),
        (
            *QWEN35,
            split(
                r"indexer\.index_qk_proj",
                **{"indexer.q_proj": (t.indexer("q"),), "indexer.k_proj": (t.indexer("k"),)},
            ),
        ),
        norm_shift=None,
    ),
    "qwen3tts": Architecture(
        ("Qwen3TTSForConditionalGeneration",), (Rule("codec_head", (Out("output"),)),), root="talker."
    ),
    "qwen35moe": Architecture(("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"), QWEN35, norm_shift=1.0),
    "gemma": Architecture(("GemmaForCausalLM",), norm_shift=1.0),
    "gemma2": Architecture(("Gemma2ForCausalLM",), norm_shift=1.0),
    "gemma3": Architecture(
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), norm_shift=1.0, other_vocabulary=True
    ),
    "gemma3n": Architecture(
        ("Gemma3nForConditionalGeneration", "Gemma3nForCausalLM"),
        (),
        r"altup_(proj|unembd|router)|per_layer_token_embd",
        other_vocabulary=True,
    ),
    "gemma4": Architecture(
        ("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4UnifiedForConditionalGeneration"), fused_experts=True
    ),
    "gemma-embedding": Architecture(("Gemma3TextModel",), (), r"^dense_", norm_shift=1.0, headless=True),
    "phi2": Architecture(("PhiForCausalLM",)),
    "phi3": Architecture(("Phi3ForCausalLM", "Phi4ForCausalLMV")),
    "phimoe": Architecture(("PhiMoEForCausalLM", "PhimoeForCausalLM")),
    "falcon": Architecture(
        ("FalconForCausalLM", "RWForCausalLM"), (rows("query_key_value", t.grouped("qkv")),)
    ),
    "falcon-h1": Architecture(("FalconH1ForCausalLM",), FALCON_H1),
    "gpt2": Architecture(("GPT2LMHeadModel", "RuGPT3XLForCausalLM"), (), r"^position_embd"),
    "gptneox": Architecture(("GPTNeoXForCausalLM",), (rows("query_key_value", t.by_head),)),
    "bloom": Architecture(("BloomForCausalLM", "BloomModel"), (rows("query_key_value", t.by_head),)),
    "mpt": Architecture(("MPTForCausalLM", "MptForCausalLM")),
    "stablelm": Architecture(("StableLmForCausalLM", "StableLMEpochForCausalLM", "LlavaStableLMEpochForCausalLM")),
    "starcoder": Architecture(("GPTBigCodeForCausalLM",), (), r"^position_embd"),
    "starcoder2": Architecture(("Starcoder2ForCausalLM",)),
    "refact": Architecture(
        ("GPTRefactForCausalLM",),
        (
            split(
                r"attn\.kv",
                attn_k=(t.block(0, t.head_dim, t.head_dim),),
                attn_v=(t.block(1, t.head_dim, t.head_dim),),
            ),
            split(r"mlp\.gate_up_proj", **HALVES),
            Rule(r"attn\.q", (Out("attn_q"),)),
        ),
    ),
    "openelm": Architecture(("OpenELMForCausalLM",), (split(r"ffn\.proj_1", **HALVES),)),
    "codeshell": Architecture(("CodeShellForCausalLM",)),
    "orion": Architecture(("OrionForCausalLM",)),
    "command-r": Architecture(("CohereForCausalLM",)),
    "cohere2": Architecture(("Cohere2ForCausalLM",)),
    "cohere2moe": Architecture(("Cohere2MoeForCausalLM",)),
    "dbrx": Architecture(
        ("DbrxForCausalLM",),
        (
            packed(r"ffn\.experts\.mlp\.w1", "ffn_gate_exps"),
            packed(r"ffn\.experts\.mlp\.v1", "ffn_up_exps"),
            packed(r"ffn\.experts\.mlp\.w2", "ffn_down_exps", transpose=True),
        ),
    ),
    "deepseek": Architecture(("DeepseekForCausalLM",), ROTARY),
    "deepseek2": Architecture(
        (
            "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "KimiVLForConditionalGeneration", "YoutuForCausalLM",
            "KimiK25ForConditionalGeneration", "Glm4MoeLiteForCausalLM", "YoutuVLForConditionalGeneration",
        ),
        LATENT,
        LATENT_IGNORED,
    ),
    "deepseek2-ocr": Architecture(("DeepseekOCRForCausalLM", "UnlimitedOCRForCausalLM")),
    "deepseek32": Architecture(("DeepseekV32ForCausalLM",), LATENT, LATENT_IGNORED),
    "deepseek4": Architecture(
        ("DeepseekV4ForCausalLM",), DEEPSEEK4, r"\.attn_output_a\.weight$|\.indexer|_compressor_|^output\.weight$"
    ),
    "dots3note": Architecture(
        ("Dots3NoteForCausalLM", "Dots3NoteForConditionalGeneration", "Dots3NoteTextForCausalLM"), LATENT, LATENT_IGNORED
    ),
    "glm-dsa": Architecture(("GlmMoeDsaForCausalLM",), LATENT, LATENT_IGNORED),
    "glm5-next": Architecture(("Glm5NextForConditionalGeneration",), LATENT, ALL_ATTENTION_IGNORED),
    "kimi-linear": Architecture(
        ("KimiLinearForCausalLM", "KimiLinearModel"),
        (*LATENT, Rule(r"forget_gate\.f_a_proj", (Out("ssm_f_a"),)), Rule(r"forget_gate\.f_b_proj", (Out("ssm_f_b"),))),
        ALL_ATTENTION_IGNORED,
    ),
    "kimi-k3": Architecture(
        ("KimiK3ForConditionalGeneration",),
        (*LATENT, Rule(r"self_attn\.g_proj", (Out("attn_gate", instead="ssm_g"),))),
        ALL_ATTENTION_IGNORED,
    ),
    "chatglm": Architecture(
        ("GlmForCausalLM", "ChatGLMModel", "ChatGLMForConditionalGeneration"),
    ),
    "glm4": Architecture(
        ("Glm4ForCausalLM", "Glm4vForConditionalGeneration", "GlmOcrForConditionalGeneration"), GLM_MROPE
    ),
    "glm4moe": Architecture(("Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration", "SolarOpenForCausalLM")),
    "plamo": Architecture(("PlamoForCausalLM",), (rows("q_proj", t.plamo), cols("o_proj", t.plamo))),
    "plamo2": Architecture(("Plamo2ForCausalLM", "PLaMo2ForCausalLM"), norm_shift=None),
    "plamo3": Architecture(("Plamo3ForCausalLM", "PLaMo3ForCausalLM"), norm_shift=None),
    "plm": Architecture(("PLMForCausalLM",), (), r"\.attn_(q|kv_a_mqa|kv_b)\.weight$"),
    "jais": Architecture(
        ("JAISLMHeadModel",),
        (Rule("wte", (Out(scale=t.jais_embedding),)), Rule("lm_head", (Out(scale=t.jais_head),))),
    ),
    "jais2": Architecture(("Jais2ForCausalLM",)),
    "grok": Architecture(("GrokForCausalLM", "Grok1ForCausalLM")),
    "grovemoe": Architecture(("GroveMoeForCausalLM", "modeling_grove_moe.GroveMoeForCausalLM")),
    "nemotron": Architecture(("NemotronForCausalLM",), norm_shift=1.0),
    "nemotron_h": Architecture(("NemotronHForCausalLM",), ROTARY, r"\.ffn_latent_"),
    "nemotron_h_moe": Architecture(("NemotronHPuzzleForCausalLM",), ROTARY, r"\.ffn_latent_"),
    "exaone": Architecture(("ExaoneForCausalLM",)),
    "exaone4": Architecture(("Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration")),
    "exaone-moe": Architecture(("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM")),
    "gpt-oss": Architecture(
        ("GptOssForCausalLM",),
        (
            split(r"experts\.gate_up_proj", ffn_gate_exps=(t.every(0, 2),), ffn_up_exps=(t.every(1, 2),)),
            *(Rule(rf"attn\.{part}_proj", (Out(f"attn_{name}"),)) for part, name in ATTENTION_PARTS),  # Tinker's names
        ),
        packed_experts=(Stored(in_out=True, declared=True), Stored(in_out=True)),
    ),
    "lfm2": Architecture(("Lfm2ForCausalLM", "LFM2ForCausalLM", "Lfm2Model", "Lfm2BidirectionalModel"), (), r"\.shortconv\.conv\.weight$"),
    "lfm2moe": Architecture(("Lfm2MoeForCausalLM",), (), r"\.shortconv\.conv\.weight$"),
    "jamba": Architecture(("JambaForCausalLM",)),
    "mamba": Architecture(("MambaForCausalLM", "MambaLMHeadModel", "FalconMambaForCausalLM")),
    "mamba2": Architecture(("Mamba2ForCausalLM",)),
    "bert": Architecture(
        (
            "BertModel", "BertForMaskedLM", "CamembertModel", "BertForSequenceClassification", "RobertaModel",
            "RobertaForSequenceClassification", "XLMRobertaModel", "XLMRobertaForSequenceClassification",
            "DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification",
        ),
        CLASSIFIER,
        r"^cls\.|^position_embd|^token_types",
        headless=True,
    ),
    "nomic-bert": Architecture(("NomicBertModel",), APART, r"^cls\.|^token_types", headless=True),
    "nomic-bert-moe": Architecture(
        (),
        (
            packed(r"mlp\.experts\.mlp\.w1", "ffn_up_exps"),
            packed(r"mlp\.experts\.mlp\.w2", "ffn_down_exps", transpose=True),
            *APART,
        ),
        r"^cls\.|^token_types",
        headless=True,
    ),
    "modern-bert": Architecture(
        ("ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification"),
        CLASSIFIER,
        r"^cls\.",
        headless=True,
    ),
    "neo-bert": Architecture(("NeoBERT", "NeoBERTLMHead", "NeoBERTForSequenceClassification"), headless=True),
    "eurobert": Architecture(("EuroBertModel", "JinaEmbeddingsV5Model"), headless=True),
    "jina-bert-v2": Architecture(("JinaBertModel", "JinaBertForMaskedLM"), headless=True),
    "jina-bert-v3": Architecture((), (), r"^token_types", headless=True),
    "rwkv6": Architecture(
        ("Rwkv6ForCausalLM",), (Rule(r"attention\.output|feed_forward\.value", (Out(scale=t.rwkv6_rescaled),)),)
    ),
    "rwkv6qwen2": Architecture(("RWKV6Qwen2ForCausalLM",)),
    "rwkv7": Architecture(("Rwkv7ForCausalLM", "RWKV7ForCausalLM"), RWKV7),
    "arwkv7": Architecture(("RwkvHybridForCausalLM",), RWKV7),
    "step35": Architecture(("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"), norm_shift=1.0),
    "t5": Architecture(
        ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration", "UMT5Model",
            "T5WithLMHeadModel",)
    ),
    "t5encoder": Architecture(("T5EncoderModel",), headless=True),
    "dots1": Architecture(("Dots1ForCausalLM",)),
    "afmoe": Architecture(("AfmoeForCausalLM",)),
    "hunyuan-moe": Architecture(("HunYuanMoEV1ForCausalLM",)),
    "hy_v3": Architecture(("HYV3ForCausalLM",)),
    "hy_v4": Architecture(("HYV4ForCausalLM",), LATENT, LATENT_IGNORED),
    "hunyuan-dense": Architecture(("HunYuanDenseV1ForCausalLM",)),
    "hunyuan_vl": Architecture(("HunYuanVLForConditionalGeneration",)),
    "seed_oss": Architecture(("SeedOssForCausalLM",)),
    "apertus": Architecture(("ApertusForCausalLM",)),
    "dream": Architecture(("DreamModel",)),
    "smallthinker": Architecture(("SmallThinkerForCausalLM",)),
    "minimax-01": Architecture(("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM")),
    "minimax-m2": Architecture(("MiniMaxM2ForCausalLM",)),
    "minimax-m3": Architecture(
        ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"), norm_shift=1.0
    ),
    "hrm_text": Architecture(("HrmTextForCausalLM",), HRM, stacks=("L_module", "H_module")),
    "laguna": Architecture(("LagunaForCausalLM",)),
    "maple": Architecture(("MapleForCausalLM",)),
    "mellum": Architecture(("MellumForCausalLM",)),
    "muse-glimmer": Architecture(("MuseGlimmerForConditionalGeneration",), ROTARY, norm_shift=None),
    "nanbeige": Architecture(("NanbeigeForCausalLM",), ROTARY),
    "spark2_5": Architecture(("Spark2_5ForCausalLM",), (Rule("q_k_v_proj", (Out("attn_qkv"),)),)),
    "talkie": Architecture(
        ("TalkieForCausalLM",), (Rule(r"attn\.attn_(query|key)", (Out(scale=t.second_half_negated),)),)
    ),
    "pockettts": Architecture(
        ("PocketTTSModel",),
        (
            split(r"self_attn\.in_proj", attn_q=(t.part(0, 3),), attn_k=(t.part(1, 3),), attn_v=(t.part(2, 3),)),
            Rule(r"self_attn\.out_proj", (Out("attn_output"),)),
            Rule("linear1", (Out("ffn_up"),)),
            Rule("linear2", (Out("ffn_down"),)),
        ),
        root="flow_lm.",
    ),
    "rnd1": Architecture(("RND1",)),
    "pangu-embedded": Architecture(("PanguEmbeddedForCausalLM",)),
    "mimo2": Architecture(("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM")),
    "maincoder": Architecture(("MaincoderForCausalLM",)),
    "bitnet": Architecture(
        ("BitnetForCausalLM", "BitNetForCausalLM"),
        caution="bitnet's weights are quantized in training too: the update is added to the quantized ones",
    ),
}  # fmt: skip
