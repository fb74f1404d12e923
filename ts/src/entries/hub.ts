/** aligngpt/hub, as it was called until 0.1: `downloadRepo` is in aligngpt/convert. */
import { deprecated } from '../util/deprecation.js'

export * from '../convert/hub.js'

deprecated('aligngpt/hub', 'aligngpt/convert')
