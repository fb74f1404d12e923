/** aligngpt/convert: checkpoints of other layouts, and the Hugging Face Hub. */
export {
  type Converted,
  type ConvertOptions,
  type ExportOptions,
  exportModel,
  importModel,
} from '../convert/convert.js'
export { type DownloadManifest, type DownloadOptions, downloadRepo } from '../convert/hub.js'
