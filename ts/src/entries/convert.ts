export * from '../convert/convert.js'
