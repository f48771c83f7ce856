// For each GGUF named: how @huggingface/gguf reads it, with all shards of a split one.
import { gguf, ggufAllShards } from "@huggingface/gguf";

for (const path of process.argv.slice(2)) {
  const split = /-\d{5}-of-\d{5}\.gguf$/.test(path);
  const { metadata, tensorInfos } = await gguf(path, { allowLocalFile: true });
  const shards = split ? (await ggufAllShards(path, { allowLocalFile: true })).shards.length : 1;
  console.log(JSON.stringify({ path, name: metadata["general.name"], fileType: metadata["general.file_type"], parents: metadata["general.base_model.count"] ?? 0, tensors: tensorInfos.length, shards }));
}
